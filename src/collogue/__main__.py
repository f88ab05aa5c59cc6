"""``python -m collogue``."""

from collogue.tools.entry import main

if __name__ == "__main__":
    main()
