# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A stand-in for rules_python where Bazel itself has rules for Python."""

def _native_rules_python(repository):
    repository.file("python/BUILD")
    repository.file("python/defs.bzl", """\
py_binary = native.py_binary
py_library = native.py_library
py_test = native.py_test
""")

native_rules_python = repository_rule(_native_rules_python)
