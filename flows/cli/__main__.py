"""`python -m lmq_flows.cli`."""

import sys

from lmq_flows.cli import main

sys.exit(main())
