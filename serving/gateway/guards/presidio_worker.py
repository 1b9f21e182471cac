"""One process that finds names and places with Presidio: JSON lines in, JSON lines out.

    python -m serving.gateway.guards.presidio_worker

First line in: ``{"model", "language", "entities", "min_score"}``; first line out: ``{"ready":
true}`` or ``{"error": why}``. Then ``{"texts": […]}`` in and ``{"spans": [[[kind, start, end], …],
…]}`` out. Nothing is downloaded: a model that is not there is an error.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def analyser(config: dict[str, Any]) -> Any:
    """texts -> spans, by the entity recogniser of a spaCy pipeline."""
    # Optional: guards/presidio.py refuses the configuration where they are not installed.
    spacy: Any = importlib.import_module("spacy")
    # Presidio imports it for an engine that is not used here: 5 s and 260 MB of each worker.
    sys.modules["transformers"] = None  # type: ignore[assignment]
    presidio: Any = importlib.import_module("presidio_analyzer")
    engines: Any = importlib.import_module("presidio_analyzer.nlp_engine")
    known: Any = importlib.import_module("presidio_analyzer.predefined_recognizers")
    del sys.modules["transformers"]  # the pipeline may need it
    language, model = config["language"], config["model"]
    if not (spacy.util.is_package(model) or Path(model).is_dir()):
        raise ValueError(f"the spaCy pipeline {model!r} is not installed and no folder")
    engine = engines.SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}])
    recognizer = known.SpacyRecognizer(supported_language=language)
    registry = presidio.RecognizerRegistry(recognizers=[recognizer], supported_languages=[language])
    analyzer = presidio.AnalyzerEngine(registry, engine, supported_languages=[language])
    entities = list(config["entities"])

    def spans(text: str) -> list[tuple[str, int, int]]:
        found = analyzer.analyze(
            text, language=language, entities=entities, score_threshold=config["min_score"]
        )
        return [(item.entity_type.lower(), item.start, item.end) for item in found]

    return spans


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    try:
        spans = analyser(json.loads(sys.stdin.readline()))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        found = [spans(text) for text in json.loads(line)["texts"]]
        print(json.dumps({"spans": found}), file=out, flush=True)


if __name__ == "__main__":
    main()
