"""The one place of the version: pyproject.toml and the manifests read it here."""

VERSION = "0.1.0"
