"""python -m smbfast: lists the commands, or runs one."""

from smbfast.commands import main

if __name__ == "__main__":
    main()
