# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs the test files named on the command line; the `main` of Bazel's tests."""

import sys

import pytest

if __name__ == "__main__":
  sys.exit(pytest.main(sys.argv[1:]))
