# Sourced by the other scripts, in the repository's root: sets PYTHON to an interpreter that has every package.
# If the current python3 has all of requirements.txt it is used; else .venv is made, once, and installed into.
# SETUP_EXTRA="requirements-dev.txt" asks for further packages.

# Lines of a run appear when they are printed, also through a pipe.
export PYTHONUNBUFFERED=1

_requirements="requirements.txt${SETUP_EXTRA:+ $SETUP_EXTRA}"

# Prints the versions that PYTHON has of every package, or fails and prints what it lacks. With `import` they are imported
# as well: a broken build is found by importing, not by looking.
_check() { # versions or import
  "$PYTHON" - "$1" $_requirements 2>&1 <<'PY'
import importlib, sys
modules = {"scikit-learn": "sklearn", "pillow": "PIL", "pytest-xdist": "xdist"}
found = {}
try:
    from importlib.metadata import version
    from packaging.requirements import Requirement
    for path in sys.argv[2:]:
        for line in open(path, encoding="utf-8"):
            line = line.partition("#")[0].strip()
            if line:
                wanted = Requirement(line)
                found[wanted.name] = version(wanted.name)
                if not wanted.specifier.contains(found[wanted.name], prereleases=True):
                    sys.exit(f"{wanted} (it has {found[wanted.name]})")
    for name in found if sys.argv[1] == "import" else ():
        importlib.import_module(modules.get(name, name))
except Exception as error:
    sys.exit(getattr(error, "name", None) or f"a working package ({error})")
print(found)
PY
}

# Holds .setup-lock, which is open as 9, until it is closed.
_LOCK='
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: another script is installing: waiting for it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks
'

_stamp() { printf '%s\n' "$_python3" "$PYTHON" "$(_check versions)"; }

_install() { # what python3 lacks
  local started=$SECONDS lacks
  if [ -z "$_python3" ]; then
    lacks=$(command -v python3 >/dev/null && python3 -V 2>&1 | tail -n 1)
    echo "setup: python3 is ${lacks:-missing}: install Python 3.10 or newer" >&2 && return 1
  fi
  exec 9>.setup-lock || return 1
  "$_python3" -c "$_LOCK"
  # Another script may have done the work meanwhile.
  if ! _check import >/dev/null; then
    echo "setup: python3 lacks $1: installing the packages of $_requirements into .venv, once: 1 to 10 minutes, 6 GB with CUDA" >&2
    # An environment without pip was never finished; one whose Python does not run, or is too old, is of no use.
    "$PYTHON" -c "$_NEW_ENOUGH" >/dev/null 2>&1 && { "$PYTHON" -m pip --version || "$PYTHON" -m ensurepip; } >/dev/null 2>&1 ||
      "$_python3" -m venv --clear .venv || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' $_requirements) || {
      echo "setup: the installation failed: see the lines above; run the script again to go on" >&2
      return 1
    }
    lacks=$(_check import) || { echo "setup: .venv lacks ${lacks##*$'\n'}, though it was installed" >&2 && return 1; }
    echo "setup: done in $((SECONDS - started)) s" >&2
  fi
  exec 9>&- # gives the lock back
}

_NEW_ENOUGH='import sys; sys.exit(print(sys.executable) if sys.version_info >= (3, 10) else 1)'
_set_up() {
  local stamp=".setup${SETUP_EXTRA:+-dev}" lacks
  _python3=$(python3 -c "$_NEW_ENOUGH" 2>/dev/null)
  # The stamp of an earlier call spares the imports, which take seconds, while python3 and all versions are the same.
  PYTHON=$(sed -n 2p "$stamp" 2>/dev/null)
  [ -z "$PYTHON" ] || [ "$(cat "$stamp")" != "$(_stamp)" ] || return 0
  PYTHON=$_python3
  if ! lacks=$([ -n "$PYTHON" ] && _check import); then
    PYTHON="$PWD/.venv/bin/python"
    _check import >/dev/null || _install "${lacks##*$'\n'}" || return 1
  fi
  _stamp 2>/dev/null >"$stamp" || true # in a folder that cannot be written, the check is repeated
}

# PYTHON set by the caller is taken as it is.
[ -n "${PYTHON:-}" ] || _set_up || exit 1
