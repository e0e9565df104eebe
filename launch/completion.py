"""Pure: the parsers of submit.py and jobs.py -> a script that completes them in bash or zsh.

    eval "$(python launch/jobs.py --completion bash)"      # once, in ~/.bashrc

Written from the parsers, once: asking Python at each press of the key would take a quarter of a second for its imports.
Names of runs are looked up by the shell, below --runs of the line or in runs/.
"""

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping

from vitdist import config
from vitdist.config import Config

SHELLS = ("bash", "zsh")

_SCRIPT = """\
# Completion of launch/submit.py and launch/jobs.py, also after python; files as always for anything else.
_vitdist_launch() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" at=0 tool="" i
    COMPREPLY=()
    for (( i = 0; i < COMP_CWORD; i++ )); do
        case "${COMP_WORDS[i]}" in
            *launch/jobs.py) tool=jobs; at=$i; break ;;
            *launch/submit.py) tool=submit; at=$i; break ;;
        esac
    done
    [[ -n "$tool" ]] || return 0
    local runs=runs run="" command="" skip=""
    for (( i = at + 1; i < COMP_CWORD; i++ )); do
        if [[ -n "$skip" ]]; then
            [[ "$skip" == --runs ]] && runs="${COMP_WORDS[i]}"
            skip=""
            continue
        fi
        case " @VALUED@ " in
            *" ${COMP_WORDS[i]} "*) skip="${COMP_WORDS[i]}"; continue ;;
        esac
        case "${COMP_WORDS[i]}" in
            -*) ;;
            *)
                if [[ -z "$run" ]]; then run="${COMP_WORDS[i]}"
                elif [[ -z "$command" ]]; then command="${COMP_WORDS[i]}"
                fi ;;
        esac
    done
    case "$before" in
        --resume|--name|--after) _vitdist_runs "$runs" "$word"; return 0 ;;
@CHOICES@
    esac
    [[ " @VALUED@ " == *" $before "* ]] && return 0
    case "$tool$word" in
        jobs-*) COMPREPLY=($(compgen -W "@JOBS@" -- "$word")) ;;
        submit-*) COMPREPLY=($(compgen -W "@SUBMIT@" -- "$word")) ;;
        submit*) _vitdist_settings "$word" ;;
        jobs*)
            if [[ -z "$run" ]]; then _vitdist_runs "$runs" "$word"
            elif [[ -z "$command" ]]; then COMPREPLY=($(compgen -W "@COMMANDS@" -- "$word"))
            elif [[ "$command" == resume ]]; then _vitdist_settings "$word"
            fi ;;
    esac
    return 0
}
_vitdist_runs() {
    local folder
    for folder in "$1"/*/; do
        folder="${folder%/}"
        [[ -e "$folder/config.yaml" || -e "$folder/sweep.yaml" ]] && [[ "${folder##*/}" == "$2"* ]] \\
            && COMPREPLY+=("${folder##*/}")
    done
    return 0
}
_vitdist_settings() {
    COMPREPLY=($(compgen -W "@SETTINGS@" -- "$1"))
    [[ ${#COMPREPLY[@]} -gt 0 ]] && { compopt -o nospace 2>/dev/null || true; }
    return 0
}
complete -o default -o bashdefault -F _vitdist_launch python python3 launch/jobs.py launch/submit.py
"""

_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser], commands: Iterable[str]) -> str:
    """The script for one of SHELLS; `parsers` by the file that they belong to, `commands` of jobs.py."""
    choices = {}
    for parser in parsers.values():
        for action in parser._actions:
            if action.choices and action.option_strings:
                choices["|".join(action.option_strings)] = " ".join(map(str, action.choices))
    lines = [
        f'        {_plain(flags)}) COMPREPLY=($(compgen -W "{_plain(words)}" -- "$word")); return 0 ;;'
        for flags, words in sorted(choices.items())
    ]
    parts = {
        "VALUED": " ".join(sorted({flag for parser in parsers.values() for flag in _flags(parser, valued=True)})),
        "CHOICES": "\n".join(lines),
        "JOBS": " ".join(_flags(parsers["jobs.py"])),
        "SUBMIT": " ".join(_flags(parsers["submit.py"])),
        "COMMANDS": " ".join(commands),
        "SETTINGS": " ".join(f"{name}=" for name, *_ in config.flat(Config)),
    }
    text = _SCRIPT
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value if name == "CHOICES" else _plain(value))
    return (_ZSH if shell == "zsh" else "") + text


def _flags(parser: argparse.ArgumentParser, valued: bool = False) -> list[str]:
    """Its options; `valued`: only those that a value follows."""
    actions = [action for action in parser._actions if not valued or action.nargs != 0]
    return sorted(flag for action in actions for flag in action.option_strings if flag.startswith("-"))


def _plain(text: str) -> str:
    """Words for double quotes of the script: nothing in them that a shell would run. Raises ValueError."""
    if not re.fullmatch(r"[\w .=|,:/-]*", text):
        raise ValueError(f"{shlex.quote(text)} cannot stand in a completion script")
    return text
