"""`python -m pbs_client`, the same as `pbs-client`."""

import sys

from pbs_client.cli import main

sys.exit(main())
