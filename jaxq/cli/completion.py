"""Scripts for shell completion, made from the parser.

zsh runs the script of bash, through its own `bashcompinit`.
"""

import argparse
import shlex
from collections.abc import Iterator

__all__ = ["completion"]

_BASH = """# Completion of jaxq. In ~/.bashrc: eval "$(jaxq completion bash)"
_jaxq() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"
    local command="" words="" prefix="" index
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "${COMP_WORDS[index]}" in
            -*) ;;
            *) command="${COMP_WORDS[index]}"; break ;;
        esac
    done
    case "$command $previous" in
@VALUES@
        *) case "$command" in
            "") words=@COMMANDS@ ;;
@WORDS@
        esac ;;
    esac
    if [[ "$current" == *,* ]]; then  # Names that are separated by commas.
        prefix="${current%,*},"
        current="${current##*,}"
    fi
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("$prefix$word")
    done < <(compgen -W "$words" -- "$current")
}
complete -o default -F _jaxq jaxq
"""

_ZSH = """# Completion of jaxq. In ~/.zshrc, after compinit: eval "$(jaxq completion zsh)"
autoload -U +X bashcompinit && bashcompinit
"""


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell.

    Args:
      shell: bash, zsh or fish.
      parser: the whole parser; its actions may have `words`, which are offered as values.
    """
    return _fish(parser) if shell == "fish" else (_ZSH if shell == "zsh" else "") + _bash(parser)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _actions(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, list[str]]]:
    """Actions, and the words for their values."""
    for action in parser._actions:
        yield action, list(getattr(action, "words", ()))


def _bash(parser: argparse.ArgumentParser) -> str:
    values, words = [], []
    for name, sub in _commands(parser).items():
        options, free = [], []
        for action, own in _actions(sub):
            options += action.option_strings
            if not action.option_strings:
                free += own
            elif action.nargs != 0:  # With words, or else with a file's name.
                patterns = "|".join(f'"{name} {option}"' for option in action.option_strings)
                values.append(f"        {patterns}) words={shlex.quote(' '.join(own))} ;;")
        words.append(f"            {name}) words={shlex.quote(' '.join([*free, *options]))} ;;")
    commands = [*_commands(parser), "--help", "--version"]
    script = _BASH.replace("@COMMANDS@", shlex.quote(" ".join(commands)))
    return script.replace("@VALUES@", "\n".join(values)).replace("@WORDS@", "\n".join(words))


def _fish(parser: argparse.ArgumentParser) -> str:
    lines = ["# Completion of jaxq: jaxq completion fish > ~/.config/fish/completions/jaxq.fish"]
    for name, sub in _commands(parser).items():
        about = shlex.quote(sub.description or "")
        lines.append(f"complete -c jaxq -n __fish_use_subcommand -f -a {name} -d {about}")
        seen = f"complete -c jaxq -n '__fish_seen_subcommand_from {name}'"
        for action, own in _actions(sub):
            parts = [seen]
            for option in action.option_strings:
                long = option.startswith("--")
                parts.append(f"-l {option[2:]}" if long else f"-s {option[1:]}")
            if action.option_strings and action.nargs != 0:
                parts.append("-x" if own else "-r")
            if own:
                parts.append(f"-a {shlex.quote(' '.join(own))}")
            if action.help:
                parts.append(f"-d {shlex.quote(action.help)}")
            if len(parts) > 1:
                lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"
