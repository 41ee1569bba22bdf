"""``python -m deepinv_deal`` is the command ``deepinv-deal``."""

import sys

from deepinv_deal.cli import main

if __name__ == "__main__":
    sys.exit(main())
