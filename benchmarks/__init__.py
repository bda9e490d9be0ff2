"""Benchmarks of focalkern against what else computes the same loss; start with `throughput.py`."""

import argparse


def parser_of(doc: str) -> argparse.ArgumentParser:
    """For a script that begins with this docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=layout, allow_abbrev=False)
