"""`python -m pbs_client.gateway`, the same as `pbs-gateway`."""

import sys

from pbs_client.gateway.cli import main

sys.exit(main())
