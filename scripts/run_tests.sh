#!/usr/bin/env bash
# Sets itself up and runs the tests; arguments go to pytest.
# FACES      folder with real faces to test on (yaleb38/, orl40/); those tests are skipped where it is unset
# TEST_JOBS  processes to share the tests out over, each on one thread; default: one per core, at most 4
[ -z "${FACES:-}" ] || FACES=$(cd "$FACES" && pwd) && export FACES
SETUP_EXTRA=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cores=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
# A file's tests stay together: they share what they have trained.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n "${TEST_JOBS:-$cores}" --dist loadscope "$@"
