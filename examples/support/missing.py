"""What an import failed for: needs nothing but Python."""


def describe_import_error(error: ImportError, extra: str) -> str:
    """Say what is missing, and how to install it where it is a package."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'{error.name} is missing: pip install -e ".[{extra}]"'
    return str(error)  # a package that is there lacks something, and says what
