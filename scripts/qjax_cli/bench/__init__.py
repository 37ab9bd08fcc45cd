# SPDX-License-Identifier: Apache-2.0
"""`qjax bench`: this machine against the free baseline and the limit."""
