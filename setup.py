"""The one part that is compiled; what else there is to say about the project stands in pyproject.toml."""

from setuptools import Extension, setup

# Optional: without a compiler, Python's or OpenSSL's headers the proxy runs in pure Python, and says so.
ENGINE = Extension(
    "agent.proxy._engine",
    ["agent/proxy/_engine.c"],
    libraries=["ssl", "crypto"],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
    optional=True,
)

setup(ext_modules=[ENGINE])
