# Sourced by the other scripts: goes to the repository's root and sets PYTHON to an interpreter that has every package.
# If the current python3 imports all of requirements.txt it is used; else .venv is made, once, and installed into.
# SETUP_EXTRA="requirements-dev.txt" asks for further packages.

# Lines of a run appear when they are printed, also through a pipe.
export PYTHONUNBUFFERED=1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

_requirements="requirements.txt${SETUP_EXTRA:+ $SETUP_EXTRA}"
_stamp_of() { printf '%s\n' "$1" "$(cat $_requirements | cksum)"; }

_imports_all() { # interpreter: can it import every package (really: a broken build is found by importing, not by looking)?
  "$1" - $_requirements >/dev/null 2>&1 <<'PY'
import importlib, re, sys
names = {"scikit-learn": "sklearn", "pillow": "PIL", "pytest-xdist": "xdist"}
for path in sys.argv[1:]:
    for line in open(path):
        package = re.split(r"[<>=!~\[ #;]", line.strip())[0]
        if package:
            importlib.import_module(names.get(package, package))
PY
}

_set_up() {
  local stamp=".setup${SETUP_EXTRA:+-dev}" started=$SECONDS
  # A stamp from an earlier call spares the check, which imports torch and takes seconds.
  if [ -f "$stamp" ]; then
    PYTHON=$(head -n 1 "$stamp")
    [ -x "$PYTHON" ] && [ "$(cat "$stamp")" = "$(_stamp_of "$PYTHON")" ] && return
  fi
  PYTHON=$(command -v python3) || { echo "setup: python3 is missing: install Python 3.10 or newer" >&2; return 1; }
  PYTHON=$("$PYTHON" -c 'import sys; print(sys.executable)')
  if ! _imports_all "$PYTHON"; then
    exec 9>.setup-lock
    # A second script started at the same time waits here, and then finds the work done.
    ! command -v flock >/dev/null || flock 9
    if [ ! -x .venv/bin/python ] || ! _imports_all .venv/bin/python; then
      echo "setup: installing the packages of $_requirements into .venv, once: 1 to 10 minutes, 6 GB with CUDA" >&2
      [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || return 1
      .venv/bin/python -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $_requirements) || {
        echo "setup: the installation failed: see the lines above; run the script again to go on" >&2
        return 1
      }
      echo "setup: done in $((SECONDS - started)) s" >&2
    fi
    exec 9>&- # gives the lock back
    PYTHON="$PWD/.venv/bin/python"
  fi
  _stamp_of "$PYTHON" >"$stamp"
}

# PYTHON set by the caller is taken as it is.
[ -n "${PYTHON:-}" ] || _set_up || exit 1
