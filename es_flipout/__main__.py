"""``python -m es_flipout`` runs the command ``es-flipout``."""

import sys

from es_flipout.cli import main

sys.exit(main())
