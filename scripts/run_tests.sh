#!/usr/bin/env bash
# Sets itself up and runs the tests; arguments go to pytest.
# FACES  folder with real faces to test on (yaleb38/, orl40/); those tests are skipped where it is unset
[ -z "${FACES:-}" ] || FACES=$(cd "$FACES" && pwd) && export FACES
SETUP_EXTRA=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" -m pytest "$@"
