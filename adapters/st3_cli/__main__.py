"""``python -m st3_cli`` is the command ``st3``."""

import sys

from st3_cli.command import main

sys.exit(main())
