"""The options ``--rules FILE`` and ``--print-rules`` of the verbs that judge films."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .site_rules import SiteRules


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Add both; ``options.rules`` is then the file's name, for :func:`chosen_rules`."""
    parser.add_argument("--rules", metavar="FILE", help="JSON file of the site's rules of acceptance")
    parser.add_argument(
        "--print-rules", action=_Print, nargs=0,
        help="print the rules (the defaults, or those of --rules FILE before it) as a file to start from, and stop",
    )  # fmt: skip


def chosen_rules(options: Any) -> SiteRules:
    """The rules of ``--rules``, or the defaults. Raises UsageError as :func:`site_rules.read_rules`."""
    from .site_rules import SiteRules, read_rules

    return SiteRules() if options.rules is None else read_rules(options.rules)


class _Print(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        print(json.dumps(chosen_rules(namespace).to_dict(), indent=2), flush=True)
        parser.exit()
