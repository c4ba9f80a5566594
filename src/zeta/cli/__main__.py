"""``python -m zeta.cli``: the command ``zeta`` where it is not installed."""

import sys

from zeta.cli import main

sys.exit(main())
