# SPDX-License-Identifier: Apache-2.0
"""Training of the model that ships with qjax: from a folder of Python sources to a directory."""
