"""``python -m zeta``: the command ``zeta`` where it is not on the path."""

import sys

from zeta.cli import main

sys.exit(main())
