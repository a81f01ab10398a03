#!/usr/bin/env bash
# Install what is missing and run the tests; arguments are passed to pytest (its help: -- --help).
# FACES      folder with real faces to test on (yaleb38/, orl40/); those tests are skipped where it is unset
# TEST_JOBS  processes to share the tests out over, each on one thread; default: one per core, at most 4
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
if [ -n "${FACES:-}" ]; then
  FACES=$(_absolute "$FACES") && export FACES
  [ -d "$FACES" ] || refuse "FACES=$FACES is no folder"
fi
[ "${1:-}" != -- ] || shift
SETUP_EXTRA=requirements-dev.txt
source scripts/setup.sh
cores=$("$PYTHON" -c 'import os; print(min(4, os.cpu_count() or 1))')
# A file's tests stay together: they share what they have trained. The longest files come first (tests/conftest.py).
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n "${TEST_JOBS:-$cores}" --dist loadscope --no-loadscope-reorder "$@"
