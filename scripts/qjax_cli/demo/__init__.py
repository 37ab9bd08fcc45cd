# SPDX-License-Identifier: Apache-2.0
"""`qjax demo`: the shipped model in many schemes, measured, drawn and speaking."""
