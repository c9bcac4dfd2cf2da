"""python -m smbfast.settings: prints docs/settings.md."""

from smbfast.settings.page import page

if __name__ == "__main__":
    print(page(), end="")
