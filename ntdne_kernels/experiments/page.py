"""How a report is written down: as Markdown, and as one HTML page that needs no other file."""

import html
from typing import Any

import jinja2


def as_markdown(content: dict[str, Any]) -> str:
    """The tables, and what must be known to read them."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["safe_text"] = lambda cell: html.escape(cell, quote=False).replace("|", r"\|")
    return environment.from_string(MARKDOWN).render(content)


def as_html(content: dict[str, Any]) -> str:
    """The same with the figures."""
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE).render(content)


MARKDOWN = r"""
{%- macro line(cells, best=()) %}
{% for cell in cells %}
{% set bold = "**" if loop.index0 in best else "" -%}
| {{ bold }}{{ cell | safe_text }}{{ bold }} {% endfor -%}
|
{% endmacro -%}
{%- macro show(table) %}
## {{ table.title }}

{{ table.caption }}

{{ line(table.header) }}
{%- for _ in table.header %}{{ "|---" if loop.index <= table.words else "|--:" }}{% endfor %}|
{% for row in table.rows %}
{{ line(row.cells, row.best) }}
{%- endfor %}

{% endmacro -%}
# Learning with wrong labels: report of {{ runs | length }} run{{ "s" if runs | length > 1 }}

{{ guide }}

{% if unlike %}
{{ guide_to_paper }}

{% for each in unlike %}
- {{ each | safe_text }}
{% endfor %}

{% endif %}
{% for table in metrics %}
{{ show(table) }}
{%- endfor %}
{% if runs | length > 1 %}
## Missing

{% for each in missing %}
- {{ each | safe_text }}
{% else %}
Nothing: every loss was run with every noise and rate.
{% endfor %}

{% endif %}
{{ show(data) }}
{%- for noise, meaning in noises.items() %}
- {{ noise }}: {{ meaning }}
{% endfor %}

{{ show(table_of_runs) }}
{%- if settings %}
The same in all runs: {{ settings | safe_text }}.

{% endif %}
{% for each in versions %}
- {{ each | safe_text }}
{% endfor %}
"""

STYLE = """\
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.5rem 4rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 56rem; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 2rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; vertical-align: top; }
nav ul { padding: 0; }
nav li { display: inline-block; margin-right: 1.2rem; }
img.drawn { max-width: 100%; height: auto; }
"""

PAGE = (
    """
{%- macro show(table) %}
<p>{{ table.caption }}</p>
<div class="wide">
<table>
<thead><tr>
{% for cell in table.header %}
<th scope="col"{% if loop.index <= table.words %} class="word"{% endif %}>{{ cell | replace(" ", "\n") }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
{% if row.paper %}
<tr class="paper"><td colspan="{{ table.words }}">{{ row.cells[table.words - 1] }}</td>
{%- for cell in row.cells[table.words:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% else %}
<tr>
{% for cell in row.cells %}
<td{% if loop.index <= table.words %} class="word"{% endif %}>
{%- if loop.index0 in row.best %}<strong>{{ cell }}</strong>{% else %}{{ cell }}{% endif %}</td>
{% endfor %}
</tr>
{% endif %}
{% endfor %}
</tbody>
</table>
</div>
{% endmacro -%}
{%- macro listed(lines) %}
<ul>
{% for line in lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endmacro -%}
{%- macro described() %}
<h2 id="data">Data</h2>
{{ show(data) }}
<ul>
{% for noise, meaning in noises.items() %}
<li>{{ noise }}: {{ meaning }}</li>
{% endfor %}
</ul>
{% endmacro -%}
{%- macro drawn(section) %}
<h2 id="{{ section.kind.slug }}">{{ section.kind.title }}</h2>
<p>{{ section.kind.caption }}</p>
{% for picture in section.pictures %}
<figure>
<img class="drawn" src="data:image/png;base64,{{ picture.data }}" alt="{{ section.kind.title }}: {{ picture.place }}">
<figcaption>{{ picture.place }} ({{ picture.file }})</figcaption>
</figure>
{% endfor %}
{% endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learning with wrong labels: report of {{ runs | length }} run{{ "s" if runs | length > 1 }}</title>
<style>
"""
    + STYLE
    + """.word { text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: pre; }
tbody tr:not(.paper) td { border-top: 1px solid #ddd; }
.paper { color: #666; font-style: italic; }
figure { margin: 1rem 0 2.5rem; }
figcaption { color: #555; font-size: 0.9rem; }
</style>
</head>
<body>
<h1>Learning with wrong labels: report of {{ runs | length }} run{{ "s" if runs | length > 1 }}</h1>
<p>In {{ "each" if runs | length > 1 else "this" }} run an encoder was trained on images of which a part had been given
wrong labels on purpose. It was then judged on test images by their true labels. The less the wrong labels harm a loss,
the better.</p>
{% if runs | length == 1 %}
{% for section in sections[:1] %}
{{ drawn(section) }}
{% endfor %}
{% endif %}
<nav>
<ul>
{% if runs | length > 1 %}
<li><a href="#data">Data</a></li>
<li><a href="#missing">Missing</a></li>
{% endif %}
{% for table in metrics %}
<li><a href="#table-{{ loop.index }}">{{ table.title }}</a></li>
{% endfor %}
{% for section in sections %}
<li><a href="#{{ section.kind.slug }}">{{ section.kind.title }}</a></li>
{% endfor %}
{% if runs | length == 1 %}
<li><a href="#data">Data</a></li>
{% endif %}
<li><a href="#runs">Runs and settings</a></li>
</ul>
</nav>

{% if runs | length > 1 %}
{{ described() }}

<h2 id="missing">Missing</h2>
{% if missing %}
<p>No finished run:</p>
{{ listed(missing) }}
{% else %}
<p>Nothing: every loss was run with every noise and rate.</p>
{% endif %}
{% endif %}

<h2>Tables</h2>
<p>{{ guide }}</p>
{% if unlike %}
<p>{{ guide_to_paper }}</p>
{{ listed(unlike) }}
{% endif %}
{% for table in metrics %}
<h3 id="table-{{ loop.index }}">{{ table.title }}</h3>
{{ show(table) }}
{% endfor %}

{% for section in sections[runs | length == 1:] %}
{{ drawn(section) }}
{% endfor %}

{% if runs | length == 1 %}
{{ described() }}
{% endif %}

<h2 id="runs">Runs and settings</h2>
{% if settings %}
<p>The same in all runs: {{ settings }}.</p>
{% endif %}
{{ show(table_of_runs) }}
{{ listed(versions) }}
</body>
</html>
"""
)
