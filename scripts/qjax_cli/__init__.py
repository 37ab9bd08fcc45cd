# SPDX-License-Identifier: Apache-2.0
"""Floor 5: the `qjax` command. Arguments, one call, output."""
