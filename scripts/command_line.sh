# Sourced first by the other scripts: answers --help, goes to the repository's root, and finds the paths among the words.

# Words after -- belong to Python.
for _word in "$@"; do
  case "$_word" in
  --) break ;;
  -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" && exit ;;
  esac
done

_caller=$PWD
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." || exit 1

refuse() { echo "$(basename "$0"): $1" >&2 && exit 2; }

# Paths are relative to where the script was called from: in variables, and as values of these options.
_absolute() { case "$1" in "" | /*) echo "$1" ;; *) echo "$_caller/$1" ;; esac; }
_paths=" RUN --adapters --after --before --cache-dir --checkpoint --config --data --deposit --originals --output-dir --pairs"
_paths+=" --allowed-signers --class-map --recipe --references --results --resume-from --replay --rows --strangers --verify-record --weights --whole-classifier "
_value() { # option, its value
  case "$1=$2" in
  --data=synthetic_faces | --rows=random | --rows=enrolment | --rows=classifier) echo "$2" ;;
  --pairs=*:*) echo "$(_absolute "${2%:*}"):$(_absolute "${2##*:}")" ;; # a list, and its folder
  --forget-classes=@* | --then=@* | --without-classes=@*) echo "@$(_absolute "${2#@}")" ;; # names in a file
  *) case "$_paths" in *" $1 "*) _absolute "$2" ;; *) printf '%s\n' "$2" ;; esac ;;
  esac
}

# Sets `arguments` to the words without the first --, their paths absolute. Words before any option are RUNs, or none.
absolute_paths() { # RUN or none, words
  local option=$1 end="" word
  arguments=() && shift
  for word in "$@"; do
    case "$word" in
    --) [ -n "$end" ] || { end=passed && continue; } ;;
    --*=*) word=${word%%=*}=$(_value "${word%%=*}" "${word#*=}") ;;
    --quick) option=RUN ;; # take no value
    -*) option=$word ;;
    *) word=$(_value "$option" "$word") ;;
    esac
    arguments+=("$word")
  done
}

# Sets `options` to the words before --, which go to compare.py, and `rest` to those after it, which go to train_forget.py.
split_words() {
  options=()
  while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    options+=("$1") && shift
  done
  rest=("${@:2}")
}

case "${PYTHON:-}" in */*) PYTHON=$(_absolute "$PYTHON") ;; esac
