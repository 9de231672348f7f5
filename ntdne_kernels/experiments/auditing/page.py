"""The page of an audit: one HTML file that needs no other, for people who decide on labels.

Shapes: N images, C classes, K neighbours.
"""

from collections.abc import Iterable
from typing import Any

import jinja2
import matplotlib
import torch
from torch import Tensor

import ntdne_kernels
from ntdne_kernels.audit import LabelAudit, nearest_neighbours
from ntdne_kernels.bank import MemoryBank
from ntdne_kernels.experiments.auditing.inputs import Source
from ntdne_kernels.experiments.auditing.pictures import BY_CLASS, quality_histogram, thumbnails, transition_map
from ntdne_kernels.experiments.page import STYLE

MOST_CLASSES = 50  # with images of their own
MOST_LISTED = 24  # images of a section
MOST_CONFUSIONS = 15

METHODS = {
    "rate": "those of the lowest quality, as many as the estimated noise rate says. A label that is the suggested one "
    "is none",
    "otsu": "the lower of the two groups that the qualities fall into. A label that is the suggested one is none",
    "auto": "those that are rarer among the image's neighbours than in the whole archive",
}


def as_html(
    audit: LabelAudit, bank: MemoryBank, source: Source, *, method: str | float | None, worst: int, neighbours: int
) -> str:
    """The page's text.

    Args:
        method: of choosing the suspects, see `LabelAudit.suspects`; None: the page names no suspects and no rate.
        worst: images shown of each class.
        neighbours: K, shown beside each.
    """
    suspects = torch.zeros_like(audit.judged) if method is None else audit.suspects(method)
    classes = _classes(audit, suspects)
    shown_classes = classes[:MOST_CLASSES]
    members = {each["code"]: _worst_of(audit, each["code"], worst) for each in shown_classes}
    lonely = ((audit.labels >= 0) & ~audit.judged).nonzero()[:, 0]
    unlabelled = (audit.labels < 0).nonzero()[:, 0]
    unlabelled = unlabelled[audit.suggested_share[unlabelled].argsort(descending=True, stable=True)]
    sparse = audit.log_density.argsort(stable=True)[:MOST_LISTED]
    copies = _conflicting_copies(audit)
    listed = [*members.values(), lonely[:MOST_LISTED], unlabelled[:MOST_LISTED], sparse]
    with_neighbours = torch.cat(listed).unique()
    items = _Items(audit, bank, source, suspects, with_neighbours, neighbours, [group[0] for group in copies])
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a name may hold a $
        histogram = quality_histogram(audit, suspects, method or "rate") if bool(audit.judged.any()) else ""
        heat_map = "" if method is None else transition_map(audit)
    for each in shown_classes:
        each["items"] = items.of(members[each["code"]])
    content = {
        "source": source,
        "audit": audit,
        "N": len(audit),
        "judged": int(audit.judged.sum()),
        "judging": method is not None,
        "suspects": int(suspects.sum()),
        "method": method,
        "meaning": METHODS.get(str(method), f"those whose score p is {method} or less"),
        "by_class": method in BY_CLASS,
        "by_score": isinstance(method, float),
        "copies_in_all": int((audit.duplicate_of >= 0).sum()),
        "conflicting": int(audit.conflicting.sum()),
        "histogram": histogram,
        "heat_map": heat_map,
        "confusions": [] if method is None else _confusions(audit),
        "classes": classes,
        "shown_classes": shown_classes,
        "copies": [[items.named(image) for image in group] for group in copies],
        "lonely": items.of(lonely[:MOST_LISTED]),
        "lonely_in_all": len(lonely),
        "unlabelled": items.of(unlabelled[:MOST_LISTED]),
        "unlabelled_in_all": len(unlabelled),
        "sparse": items.of(sparse),
        "pictures": bool(items.thumbnails),
        "most_listed": MOST_LISTED,
        "version": ntdne_kernels.__version__,
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "share": _share, "count": lambda count: f"{count:,}"}
    return environment.from_string(TEMPLATE).render(content)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


def _share(value: float) -> str:
    return "–" if value != value else "< 0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def _classes(audit: LabelAudit, suspects: Tensor) -> list[dict[str, Any]]:
    """All classes, those with the most suspects first."""
    C = len(audit.classes)
    sizes = torch.bincount(audit.labels[audit.labels >= 0], minlength=C).tolist()
    wrong = torch.bincount(audit.labels[suspects], minlength=C).tolist()
    order = sorted(range(C), key=lambda code: -wrong[code])
    return [
        {"code": code, "name": str(audit.classes[code]), "size": sizes[code], "suspects": wrong[code]} for code in order
    ]


def _worst_of(audit: LabelAudit, code: int, count: int) -> Tensor:
    """Up to `count` judged images of a class, by rising quality."""
    images = ((audit.labels == code) & audit.judged).nonzero()[:, 0]
    return images[audit.quality[images].argsort(stable=True)[:count]]


def _conflicting_copies(audit: LabelAudit) -> list[list[int]]:
    """Groups of images that are the same, and whose labels are not."""
    groups: dict[int, list[int]] = {}
    for image in audit.conflicting.nonzero()[:, 0].tolist():
        first = int(audit.duplicate_of[image])
        groups.setdefault(image if first < 0 else first, []).append(image)
    return list(groups.values())[:MOST_LISTED]


def _confusions(audit: LabelAudit) -> list[dict[str, Any]]:
    """The most frequent pairs of a given label and another class."""
    given, true, count = audit.confusions
    other = (given != true) & (count >= 0.5)
    given, true, count = given[other], true[other], count[other]
    sizes = torch.bincount(audit.labels[audit.judged], minlength=len(audit.classes))
    most = count.argsort(descending=True, stable=True)[:MOST_CONFUSIONS]
    return [
        {
            "given": str(audit.classes[int(given[i])]),
            "true": str(audit.classes[int(true[i])]),
            "count": round(float(count[i])),
            "share": float(count[i] / sizes[given[i]]),
        }
        for i in most.tolist()
    ]


class _Items:
    """Images as the page shows them: with their labels, scores and neighbours, and their pictures."""

    def __init__(
        self,
        audit: LabelAudit,
        bank: MemoryBank,
        source: Source,
        suspects: Tensor,
        images: Tensor,
        K: int,
        others: Iterable[int],
    ) -> None:
        self.audit, self.source, self.suspects = audit, source, suspects
        self.score, self.suggested = audit.score, audit.suggested
        self.rank = torch.empty_like(audit.ranking)
        self.rank[audit.ranking] = torch.arange(1, len(audit) + 1)
        self.neighbours: dict[int, list[tuple[int, float]]] = {}
        found = (part.tolist() for part in nearest_neighbours(bank, images, K))
        for image, nearest, similarity in zip(images.tolist(), *found, strict=True):
            self.neighbours[image] = list(zip(nearest, similarity, strict=True))
        shown = {*others, *self.neighbours, *(n for nearest in self.neighbours.values() for n, _ in nearest)}
        self.thumbnails = {} if source.picture is None else thumbnails(source.picture, sorted(shown))

    def of(self, images: Tensor) -> list[dict[str, Any]]:
        return [self._item(image) for image in images.tolist()]

    def named(self, image: int) -> dict[str, Any]:
        """An image's number, file and label; None where it has none."""
        label = int(self.audit.labels[image])
        return {
            "image": image,
            "path": "" if self.source.paths is None else self.source.paths[image],
            "label": None if label < 0 else str(self.audit.classes[label]),
            "thumbnail": self.thumbnails.get(image, ""),
        }

    def _item(self, image: int) -> dict[str, Any]:
        audit = self.audit
        label, suggested = int(audit.labels[image]), int(self.suggested[image])
        compared = suggested if label < 0 else label
        return self.named(image) | {
            "suggested": str(audit.classes[suggested]) if suggested >= 0 else None,
            "share": float(audit.suggested_share[image]),
            "other": suggested != label,
            "judged": bool(audit.judged[image]),
            "score": float(self.score[image]),
            "quality": float(audit.quality[image]),
            "suspect": bool(self.suspects[image]),
            "rank": int(self.rank[image]),
            "neighbours": [
                self.named(neighbour)
                | {
                    "similarity": similarity,
                    "relation": "unknown" if other < 0 else "same" if other == compared else "different",
                }
                for neighbour, similarity in self.neighbours[image]
                for other in [int(audit.labels[neighbour])]
            ],
        }


TEMPLATE = (
    """
{%- macro picture(it, size) %}
{% if it.thumbnail %}
<img src="{{ it.thumbnail }}" alt="image {{ it.image }}" title="{{ it.path }}" class="{{ size }}">
{%- else %}
<span class="missing {{ size }}" title="{{ it.path }}">no picture</span>
{%- endif %}
{% endmacro -%}
{%- macro label(name) %}{% if name is none %}<em>no label</em>{% else %}{{ name }}{% endif %}{% endmacro -%}
{%- macro file(it) %}{{ it.path or "image " ~ it.image }}{% endmacro -%}
{%- macro sign(relation) %}{{ {"same": "=", "different": "≠", "unknown": "?"}[relation] }}{% endmacro -%}
{%- macro verdict(it) %}
<span class="given">{{ label(it.label) }}</span>
{%- if it.suggested is not none %}
{%- if it.other %} → <strong>{{ it.suggested }}</strong> ({{ it.share | percent }})
{%- else %} (as {{ it.share | percent }} of its neighbours){% endif %}
{%- endif %}
{%- if it.suspect %} <span class="suspect">suspect</span>{% endif %}
{% endmacro -%}
{%- macro numbers(it) %}
{%- if it.judged %}
score {{ it.score | share }}, quality {{ it.quality | share }}, rank {{ it.rank | count }}
{%- else %}not judged{% endif %}
{% endmacro -%}
{%- macro shown(items) %}
{% if pictures %}
{% for it in items %}
<div class="item">
<div class="image">
{{ picture(it, "large") }}
<p>{{ verdict(it) }}<br><small>{{ numbers(it) }}<br><span class="path">{{ file(it) }}</span></small></p>
</div>
<div class="neighbours">
{% for n in it.neighbours %}
<figure class="{{ n.relation }}">
{{ picture(n, "small") }}
<figcaption>{{ sign(n.relation) }} {{ label(n.label) }}<br>{{ "%.3f" | format(n.similarity) }}</figcaption>
</figure>
{% endfor %}
</div>
</div>
{% endfor %}
{% else %}
<div class="wide">
<table>
<thead><tr><th class="word">image</th><th class="word">label → suggested (its share)</th><th>score p</th>
<th>quality</th><th>rank</th><th class="word">nearest images: label and similarity</th></tr></thead>
<tbody>
{% for it in items %}
<tr><td class="word path">{{ file(it) }}</td><td class="word">{{ verdict(it) }}</td>
<td>{% if it.judged %}{{ it.score | share }}{% else %}–{% endif %}</td><td>{{ it.quality | share }}</td>
<td>{{ it.rank | count }}</td>
<td class="word">{% for n in it.neighbours %}
<span class="near {{ n.relation }}" title="{{ file(n) }}">{{ sign(n.relation) }} {{ label(n.label) }}
{{ "%.3f" | format(n.similarity) }}</span>
{% endfor %}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% endmacro -%}
{%- macro first_of(items, total, what) %}
{% if items | length < total %}
<p>The first {{ items | length }} of {{ total | count }} {{ what }}; the table has all.</p>
{% endif %}
{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Labels of {{ source.name }}: an audit</title>
<style>
"""
    + STYLE
    + """.word { text-align: left; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody td, tbody th { border-top: 1px solid #ddd; }
.facts th { text-align: left; font-weight: normal; }
[hidden] { display: none !important; }
#filters { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; margin: 1.5rem 0; }
.item { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0.7rem 0; border-top: 1px solid #ddd; }
.image { display: flex; gap: 0.7rem; width: 24rem; max-width: 100%; }
.image p { margin: 0; line-height: 1.35; min-width: 0; }
.neighbours { display: flex; flex-wrap: wrap; gap: 0.4rem; }
figure { margin: 0; width: 5.4rem; font-size: 0.75rem; line-height: 1.25; overflow-wrap: anywhere; }
img.large, img.small, .missing { object-fit: contain; background: #f2f2f2; image-rendering: auto; flex: none; }
.large { width: 6rem; height: 6rem; }
.small { width: 4.9rem; height: 4.9rem; border: 0.25rem solid #777; }
.missing { display: inline-block; box-sizing: border-box; font-size: 0.7rem; color: #666; text-align: center; }
.same .small { border: 0.25rem solid #009E73; }
.different .small { border: 0.25rem dashed #D55E00; }
.unknown .small { border: 0.25rem dotted #777; }
.near { display: inline-block; margin: 0 0.6rem 0.2rem 0; padding-left: 0.3rem; border-left: 0.25rem solid #777; }
.near.same { border-left: 0.25rem solid #009E73; }
.near.different { border-left: 0.25rem dashed #D55E00; }
.near.unknown { border-left: 0.25rem dotted #777; }
.suspect { border: 1px solid #D55E00; color: #A04500; border-radius: 0.2rem; padding: 0 0.3rem; font-size: 0.75rem; }
.doubt { border-left: 0.4rem solid #D55E00; background: #fff3ec; padding: 0.6rem 1rem; }
.path { overflow-wrap: anywhere; color: #555; }
</style>
</head>
<body>
<h1>Labels of {{ source.name }}: an audit</h1>
{% if judged and audit.doubt %}
<p class="doubt"><strong>How many labels are wrong cannot be said from these features:</strong> {{ audit.doubt }}.
{% if judging %}Suspects are named and counted below as if they were good, because --force says so; most of them may be
right labels.{% else %}Below, labels are ranked all the same, the most suspect first; many of the first may be right.
{%- endif %} Better features help: those of an encoder that was trained for longer, or on more images like these.</p>
{% endif %}
<p>The labels of {{ N | count }} images were compared with those of the images most like them.
{% if judging %}<strong>{{ suspects | count }} labels are suspect</strong>{% if judged %},
{{ (suspects / judged) | percent }} of the {{ judged | count }} that could be judged{% endif %}; about
{{ audit.noise_rate | percent }} are estimated to be wrong. A suspect{% else %}A low rank{% endif %} is a question, not
a verdict: look at the image and at its neighbours, and decide.</p>
{% if source.picture and not pictures %}
<p>None of the pictures could be opened, so that images are shown by name alone; <code>--images</code> says which folder
the names are relative to.</p>
{% endif %}
<nav>
<ul>
<li><a href="#reading">How to read this</a></li>
<li><a href="#quality">Quality</a></li>
{% if judging %}<li><a href="#confusions">Confusions</a></li>{% endif %}

<li><a href="#classes">Classes</a></li>
{% if copies %}<li><a href="#copies">Copies</a></li>{% endif %}
{% if lonely %}<li><a href="#lonely">Classes with one image</a></li>{% endif %}
{% if unlabelled %}<li><a href="#unlabelled">Unlabelled</a></li>{% endif %}
<li><a href="#sparse">Unlike the others</a></li>
{% if source.unreadable %}<li><a href="#unreadable">Unreadable</a></li>{% endif %}
</ul>
</nav>
<table class="facts">
<tbody>
<tr><th scope="row">images</th><td>{{ N | count }}</td></tr>
<tr><th scope="row">classes</th><td>{{ classes | length | count }}</td></tr>
<tr><th scope="row">labels judged</th><td>{{ judged | count }}</td></tr>
{% if judging %}
<tr><th scope="row">suspects</th><td>{{ suspects | count }}</td></tr>
<tr><th scope="row">estimated noise rate</th><td>{{ audit.noise_rate | percent }}</td></tr>
{% endif %}
<tr><th scope="row">images without a label</th><td>{{ unlabelled_in_all | count }}</td></tr>
<tr><th scope="row">images that are the only one of their class</th><td>{{ lonely_in_all | count }}</td></tr>
<tr><th scope="row">exact copies of an earlier image</th><td>{{ copies_in_all | count }}</td></tr>
<tr><th scope="row">images whose exact copy has another label</th><td>{{ conflicting | count }}</td></tr>
{% if source.unreadable %}
<tr><th scope="row">files left out, as they cannot be read</th><td>{{ source.unreadable | length | count }}</td></tr>
{% endif %}
</tbody>
</table>

<h2 id="reading">How to read this</h2>
<ul>
<li>Each image is compared with all others. The more alike two images are, the more the one weighs among the other's
neighbours; σ = {{ audit.sigma }} says how fast that falls with the similarity (the cosine of their features, 1 for the
same).</li>
<li><em>Score p</em>: the share of an image's neighbours, by weight, that carry its label. 1: all do; 0: none does.</li>
<li><em>Suggested label</em>, after →: the class with the largest share of the neighbours, and that share.</li>
<li><em>Quality</em>, from 0 to 1: the score, with allowance for how mixed the neighbours are. 0: no neighbour carries
the label; 0.5: the label is as unusual among them as theirs are on average; 1: all carry it. <em>Rank</em> 1 has the
lowest quality of all.</li>
{% if judging %}
<li><em>Suspect labels</em> ({% if by_score %}threshold k = {{ method }}{% else %}method “{{ method }}”{% endif %}) are
{{ meaning }}.</li>
{% endif %}
<li>{% if pictures %}Frames of neighbours{% else %}Bars beside neighbours{% endif %}: <span class="near same">=
green</span> the same label as the image's (where it has none, as the suggested one); <span class="near different">≠
orange, dashed</span> another label; <span class="near unknown">? grey, dotted</span> no label. The number is the
similarity.</li>
<li>Where neighbours are not alike to your eye, the features are no good for this archive, and neither is the
audit.</li>
</ul>

<h2 id="quality">Quality of the labels</h2>
{% if histogram %}
<p><img class="drawn" src="{{ histogram }}" alt="Histogram of the {{ "scores" if by_score else
"qualities" }} of all judged labels{% if judging %}, suspects apart{% endif %}"></p>
{% if by_class and suspects %}
<p>The threshold is not one number: it differs from class to class.</p>
{% endif %}
{% else %}
<p>No label could be judged: no two images carry the same one.</p>
{% endif %}

{% if judging %}
<h2 id="confusions">Confusions</h2>
<p>Which labels are thought to stand for which classes, over the whole archive. The counts are estimates of their own
and need not agree with those of suspects, which are single images.</p>
{% if confusions %}
<p>The most frequent:</p>
<div class="wide">
<table>
<thead><tr><th class="word">label given</th><th class="word">thought to be</th><th>images</th>
<th>of the label's images</th></tr></thead>
<tbody>
{% for each in confusions %}
<tr><td class="word">{{ each.given }}</td><td class="word">{{ each.true }}</td><td>{{ each.count | count }}</td>
<td>{{ each.share | percent }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p>None.</p>
{% endif %}
{% if heat_map %}
<p>Of the images that are thought to be of a class (row), the percentage that was given each label (column). Right
labels, on the diagonal, are not coloured.</p>
<p><img class="drawn" src="{{ heat_map }}" alt="Heat map of the labels given to each class; the table
above has its largest entries"></p>
{% endif %}
{% endif %}

<h2 id="classes">Classes</h2>
{% if shown_classes | length < classes | length %}
<p>The {% if not judging %}first {% endif %}{{ shown_classes | length }} of {{ classes | length | count }} classes
{%- if judging %} that have the most suspects{% endif %}.</p>
{% endif %}
<div class="wide">
<table>
<thead><tr><th class="word">class</th><th>images</th>
{%- if judging %}<th>suspects</th><th>share</th>{% endif %}</tr></thead>
<tbody>
{% for each in shown_classes %}
<tr><td class="word">{% if each["items"] %}<a href="#class-{{ each.code }}">{{ each.name }}</a>{% else %}{{ each.name }}
{%- endif %}</td><td>{{ each.size | count }}</td>{% if judging %}<td>{{ each.suspects | count }}</td>
<td>{{ (each.suspects / each.size) | percent }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
<form id="filters" hidden>
<label>Classes whose name has <input type="search" id="named"></label>
{% if judging and pictures %}
<label><input type="checkbox" id="suspects-only"> suspects only</label>
{% endif %}
</form>
{% for each in shown_classes if each["items"] %}
<section class="class" data-name="{{ each.name }}">
<h3 id="class-{{ each.code }}">{{ each.name }}</h3>
<p>{% if judging %}{{ each.suspects | count }} of {{ each.size | count }} images are suspects. {% endif %}Of the lowest
quality:</p>
{{ shown(each["items"]) }}
</section>
{% endfor %}

{% if copies %}
<h2 id="copies">Copies with different labels</h2>
<p>{{ conflicting | count }} images have exactly the same features as an image with another label. One of the labels
must be wrong.{% if copies | length == most_listed %} The first {{ most_listed }} groups; the table's column
<code>conflicting</code> has all.{% endif %}</p>
{% for group in copies %}
<div class="item">
{% if pictures %}{{ picture(group[0], "large") }}{% endif %}
<ul>
{% for it in group %}
<li><strong>{{ label(it.label) }}</strong>: <span class="path">{{ file(it) }}</span></li>
{% endfor %}
</ul>
</div>
{% endfor %}
{% endif %}

{% if lonely %}
<h2 id="lonely">Classes with one image</h2>
<p>No other image carries their label, so there is nothing to judge it by. A label that occurs once is often a slip of
the pen.</p>
{{ first_of(lonely, lonely_in_all, "images") }}
{{ shown(lonely) }}
{% endif %}

{% if unlabelled %}
<h2 id="unlabelled">Images without a label</h2>
<p>With the class that is suggested, the surest first.</p>
{{ first_of(unlabelled, unlabelled_in_all, "images") }}
{{ shown(unlabelled) }}
{% endif %}

<h2 id="sparse">Unlike the others</h2>
<p>The {{ sparse | length }} images that are least like any others: perhaps broken ones, or of a class that the archive
does not have. There are always some; what is said of their labels means little.</p>
{{ shown(sparse) }}

{% if source.unreadable %}
<h2 id="unreadable">Files that cannot be read</h2>
<p>They were left out of everything above.</p>
<ul>
{% for file in source.unreadable[:200] %}
<li class="path">{{ file }}</li>
{% endfor %}
{% if source.unreadable | length > 200 %}<li>and {{ source.unreadable | length - 200 }} more</li>{% endif %}
</ul>
{% endif %}

<p><small>Made by ntdne_kernels {{ version }}.</small></p>
<script>
const form = document.getElementById("filters");
const named = document.getElementById("named"), suspectsOnly = document.getElementById("suspects-only");
function filter() {
  const name = named.value.trim().toLowerCase(), only = suspectsOnly !== null && suspectsOnly.checked;
  for (const section of document.querySelectorAll(".class")) {
    let shown = !only;
    for (const item of section.querySelectorAll(".item")) {
      item.hidden = only && item.querySelector(".suspect") === null;
      shown ||= !item.hidden;
    }
    section.hidden = !shown || !section.dataset.name.toLowerCase().includes(name);
  }
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
filter();
</script>
</body>
</html>
"""
)
