"""The README.md of a model on the Hugging Face hub."""

import json
from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

_TEXT = """\
# {model}

{description}

- {num_parameters:,} parameters, float32
- paper: [Generative Modeling via Drifting](https://arxiv.org/abs/2602.04770), M. Deng, H. Li, T. Li, Y. Du, K. He
- code: driftfield

## Use

With driftfield installed from its repository (`pip install -e '.[vision]'`):

```python
from {module} import {model}
model = {model}.from_pretrained({repository!r})
model = model.to("cuda")  # or leave it on the CPU
```

## Arguments

```json
{arguments}
```
"""


def model_card(
    *,
    repository: str,
    model: str,
    module: str,
    description: str,
    num_parameters: int,
    arguments: Mapping[str, Any],
    license: str,
    dataset: str | None = None,
    metrics: Mapping[str, float | str] | None = None,
) -> str:
    """Text of a model's README.md, with a section for what is given and none for what is not.

    Args:
        repository: "owner/name" on the hub.
        model, module: name of the class, and where it is imported from.
        description: what the model is, a sentence.
        num_parameters: how many it has.
        arguments: keywords of its constructor.
        license: identifier of the licence, such as "mit".
        dataset: what it was trained on.
        metrics: values by name; a name says its protocol.

    >>> card = model_card(repository="me/m", model="M", module="m", description="A model.", num_parameters=3,
    ...                   arguments={}, license="mit", metrics={"FID": 8.46})
    >>> card.splitlines()[-1]
    '| FID | 8.46 |'
    """
    header = {"license": license, "tags": ["drifting", "one-step-generation", "pytorch"]}
    text = _TEXT.format(
        repository=repository, model=model, module=module, description=description, num_parameters=num_parameters,
        arguments=json.dumps(arguments, indent=2),
    )  # fmt: skip
    if dataset:
        text += f"\n## Data\n\nTrained on {dataset}.\n"
    if metrics:
        text += "\n## Metrics\n\n| metric | value |\n|---|---|\n"
        text += "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in metrics.items())
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{text}"


def _cell(value: float | str) -> str:
    text = value if isinstance(value, str) else f"{value:g}"
    return text.replace("|", r"\|").replace("\n", " ")
