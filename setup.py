"""Builds ``wsync._C`` and, where nvcc is found, ``wsync/libwsync_cuda.so``. Everything else is in pyproject.toml."""

import os

from setuptools import setup

cmake_args = []
if os.environ.get("WSYNC_CUDA"):
    cmake_args.append(f"-DWSYNC_CUDA={os.environ['WSYNC_CUDA']}")
if os.environ.get("WSYNC_SANITIZE"):
    cmake_args.append(f"-DWSYNC_SANITIZE={os.environ['WSYNC_SANITIZE']}")

setup(cmake_source_dir=".", cmake_args=cmake_args)
