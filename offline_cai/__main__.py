"""`python -m offline_cai` is `offline-cai`."""

import sys

from offline_cai.cli import main

sys.exit(main())
