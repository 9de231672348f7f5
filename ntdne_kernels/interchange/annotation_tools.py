"""Labels, scores and decisions in the import formats of FiftyOne, Label Studio and CVAT.

All take the table of `to_frame`, to which `Decisions.add_to` adds what people decided: columns path and given_label,
and of predicted_label, suggested_share, label_score, is_label_issue, verdict and corrected_label those that are there.
A result maps the names of files to their text, to be written into one folder.

Shapes: N images.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("given_label", "predicted_label", "corrected_label")
SCORES = ("label_score", "suggested_share", "rank")
ABOUT = ("given_label", "verdict", "label_score")  # attributes of a tag in CVAT
VERDICTS = ("keep", "relabel", "unsure", "exclude")
LOCAL_FILES = "/data/local-files/?d="  # how Label Studio calls a file below its document root


def to_fiftyone(frame: "pd.DataFrame") -> dict[str, str]:
    """samples.json, which FiftyOne reads as its LegacyFiftyOneDataset.

        new = {"dataset_type": fiftyone.types.LegacyFiftyOneDataset, "dataset_dir": "fiftyone/", "rel_dir": "photos/"}
        dataset = fiftyone.Dataset.from_dir(**new)
        dataset.merge_dir(**new)  # or into a dataset that has these files already

    Labels are fields of type Classification, of predicted_label with the share as its confidence; scores are fields of
    numbers. Tags are the verdict, and label_issue for suspects.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"path": ["1.png"], "given_label": ["ash"], "label_score": [0.5]})
        >>> json.loads(to_fiftyone(frame)["samples.json"])["samples"]  # doctest: +NORMALIZE_WHITESPACE
        [{'filepath': '1.png', 'tags': [],
          'given_label': {'_cls': 'Classification', 'label': 'ash'}, 'label_score': 0.5}]

    Args:
        frame: of N images.

    Raises:
        ValueError: there is no column path or given_label.
    """
    samples = []
    for row in _rows(frame):
        tags = [row["verdict"]] if "verdict" in row else []
        sample: dict[str, Any] = {
            "filepath": row["path"],
            "tags": tags + ["label_issue"] * row.get("is_label_issue", False),
        }
        for name in (name for name in LABELS if name in row):
            sample[name] = {"_cls": "Classification", "label": str(row[name])}
            if name == "predicted_label" and "suggested_share" in row:
                sample[name]["confidence"] = row["suggested_share"]
        samples.append(sample | {name: row[name] for name in SCORES if name in row})
    return {"samples.json": _json({"samples": samples})}


def to_label_studio(frame: "pd.DataFrame", prefix: str = LOCAL_FILES) -> dict[str, str]:
    """tasks.json, which Label Studio imports, and label_config.xml, the project's labeling interface.

    A task's annotation is what people decided: the verdict, and the class where they named one. Its predictions are the
    given label ("given") and the suggested one ("ntdne_kernels", with its share as the score).

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"path": ["a b.png"], "given_label": ["ash"], "verdict": ["unsure"]})
        >>> [task] = json.loads(to_label_studio(frame)["tasks.json"])
        >>> task["data"]
        {'image': '/data/local-files/?d=a%20b.png', 'given_label': 'ash', 'verdict': 'unsure'}
        >>> task["annotations"][0]["result"][0]["value"]
        {'choices': ['unsure']}

    Args:
        frame: of N images.
        prefix: of the images' addresses; the default is for files below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT.

    Raises:
        ValueError: as `to_fiftyone`.
    """
    tasks: list[dict[str, Any]] = []
    classes: set[str] = set()
    for row in _rows(frame):
        labels = {name: str(row[name]) for name in LABELS if name in row}
        classes.update(labels.values())
        task: dict[str, Any] = {"data": {"image": prefix + quote(row["path"], errors="surrogateescape")}}
        task["data"] |= {name: row[name] for name in (*LABELS, *SCORES, "verdict") if name in row}
        if "verdict" in row:
            decided = [_choice("verdict", row["verdict"])]
            if "corrected_label" in row and row["verdict"] in ("keep", "relabel"):
                decided.append(_choice("label", labels["corrected_label"]))
            task["annotations"] = [{"result": decided}]
        guesses = (
            [{"model_version": "given", "result": [_choice("label", labels["given_label"])]}]
            if "given_label" in row
            else []
        )
        if "predicted_label" in row:
            guess = {"model_version": "ntdne_kernels", "result": [_choice("label", labels["predicted_label"])]}
            guesses.append(guess | ({"score": row["suggested_share"]} if "suggested_share" in row else {}))
        tasks.append(task | {"predictions": guesses})
    choices = {"label": sorted(classes), "verdict": VERDICTS}
    controls = "".join(
        f'  <Choices name="{name}" toName="image" choice="single">\n'
        + "".join(f"    <Choice value={quoteattr(value)}/>\n" for value in values)
        + "  </Choices>\n"
        for name, values in choices.items()
    )
    config = f'<View>\n  <Image name="image" value="$image"/>\n{controls}</View>\n'
    return {"tasks.json": _json(tasks), "label_config.xml": config}


def to_cvat(frame: "pd.DataFrame") -> dict[str, str]:
    """annotations.xml, which CVAT imports as "CVAT 1.1" (images), and labels.json, for the task's raw label editor.

    An image has a tag with its corrected label; without decisions, and where people could not tell, with the given one.
    One that was excluded has none. Attributes of the tag are the given label, the verdict and the label's score.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"path": ["1.png"], "given_label": ["ash"], "corrected_label": ["oak"]})
        >>> print(to_cvat(frame)["annotations.xml"])
        <?xml version="1.0" encoding="utf-8"?>
        <annotations>
          <version>1.1</version>
          <meta><task><labels>
            <label><name>ash</name></label>
            <label><name>oak</name></label>
          </labels></task></meta>
          <image id="0" name="1.png">
            <tag label="oak" source="manual">
              <attribute name="given_label">ash</attribute>
            </tag>
          </image>
        </annotations>
        <BLANKLINE>

    Args:
        frame: of N images.

    Raises:
        ValueError: as `to_fiftyone`.
    """
    labelled = "corrected_label" if "corrected_label" in frame else "given_label"
    images: list[str] = []
    classes: set[str] = set()
    for image, row in enumerate(_rows(frame)):
        classes.update(str(row[name]) for name in ("given_label", labelled) if name in row)
        images.append(f'  <image id="{image}" name={quoteattr(row["path"])}>')
        if labelled in row:
            images.append(f'    <tag label={quoteattr(str(row[labelled]))} source="manual">')
            for name in ABOUT:
                if name in row:
                    images.append(f'      <attribute name="{name}">{escape(str(row[name]))}</attribute>')
            images.append("    </tag>")
        images.append("  </image>")
    names = [f"    <label><name>{escape(name)}</name></label>" for name in sorted(classes)]
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "  <version>1.1</version>"]
    lines += ["  <meta><task><labels>", *names, "  </labels></task></meta>", *images, "</annotations>", ""]
    text = {"mutable": False, "input_type": "text", "default_value": "", "values": [""]}
    attributes = [{"name": name} | text for name in ABOUT if name in frame]
    labels = [{"name": name, "type": "tag", "attributes": attributes} for name in sorted(classes)]
    return {"annotations.xml": "\n".join(lines), "labels.json": _json(labels)}


def _rows(frame: "pd.DataFrame") -> Iterator[dict[str, Any]]:
    """The values of each image by column, without missing ones."""
    import pandas as pd

    for name in ("path", "given_label"):
        if name not in frame:
            raise ValueError(f"frame: expected a column {name}, got {', '.join(map(str, frame.columns)) or 'none'}")
    names = [name for name in ("path", *LABELS, *SCORES, "is_label_issue", "verdict") if name in frame]
    for values in frame[names].astype(object).itertuples(index=False, name=None):
        yield {name: value for name, value in zip(names, values, strict=True) if not pd.isna(value)}


def _choice(name: str, value: str) -> dict[str, Any]:
    return {"id": name, "from_name": name, "to_name": "image", "type": "choices", "value": {"choices": [value]}}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)
