# shellcheck shell=bash
# Functions that the other scripts of this folder source; not a script to run.

# Prints words so that any shell reads them back unchanged: bare if that is safe, otherwise in single quotes.
quoted() {
  local word text='' escaped="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      # The part up to the first = stays bare: --flag='two words' and NAME='two words' look as they were typed.
      if [[ $word =~ ^([A-Za-z0-9_.-]+=)(.*)$ ]]; then
        word="${BASH_REMATCH[1]}'${BASH_REMATCH[2]//\'/$escaped}'"
      else
        word="'${word//\'/$escaped}'"
      fi
    fi
    text+="${text:+ }$word"
  done
  printf '%s\n' "$text"
}

wrong_use() {
  echo "${me:-$(basename "$0")}: $*" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]{0,4}$ ]]; }

needs_command() { # "$@": the arguments after the script's own flags
  case ${1:-} in
  '') wrong_use "COMMAND is missing, such as: train --config=... --workdir=..." ;;
  -*) wrong_use "there is no flag $1" ;;
  esac
}

pids=() # process groups that the caller has started
logs=() # log file of each; empty if it prints to this terminal

stop_when_asked() {
  echo "stopping: waiting until all have saved" >&2
  stop_all
}
asked=''
remember_signals() { trap 'asked=1' TERM INT; } # while processes are being started

# Waits for all of them and exits with the first exit code that is not 0.
# SIGTERM and SIGINT call the caller's stop_all, which lets every process save. If one fails, the others have IBQ_GRACE
# seconds to exit by themselves; then stop_all is called, and 30 seconds later the remaining ones are killed. (143 is
# not a failure: the others stop at the same step, and saving may take a while.)
attend() {
  local -a left=("${!pids[@]}")
  local -a still
  local i code first=0 deadline='' ended=''
  trap stop_when_asked TERM INT
  [ -z "$asked" ] || stop_when_asked
  while [ ${#left[@]} -gt 0 ]; do
    still=()
    for i in "${left[@]}"; do
      if kill -0 "${pids[i]}" 2>/dev/null; then
        still+=("$i")
        continue
      fi
      code=0
      wait "${pids[i]}" || code=$?
      [ "$code" -ne 0 ] || continue
      [ "$first" -ne 0 ] || first=$code
      [ "$code" -ne 143 ] || continue
      echo "process $i ended with exit code $code${logs[i]:+; its output: ${logs[i]}}" >&2
      [ -n "$deadline" ] || deadline=$((SECONDS + ${IBQ_GRACE:-60}))
    done
    left=(${still[@]+"${still[@]}"})
    if [ ${#left[@]} -gt 0 ] && [ -n "$deadline" ] && [ $SECONDS -ge "$deadline" ]; then
      if [ -z "$ended" ]; then
        echo "ending the other ${#left[@]}" >&2
        stop_all
        ended=1
        deadline=$((SECONDS + 30))
      else
        for i in "${left[@]}"; do kill -KILL -- "-${pids[i]}" 2>/dev/null || true; done # with its own children
      fi
    fi
    [ ${#left[@]} -eq 0 ] || sleep 0.2
  done
  exit "$first"
}
