"""`python -m gdn`: the command line."""

import sys

from gdn.cli import main

sys.exit(main())
