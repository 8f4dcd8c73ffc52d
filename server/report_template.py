"""The page of the report: HTML, CSS and nothing that runs or loads.

Kept as Python because Flower's app bundle carries ``.py`` files and drops ``.j2`` and ``.html``.
Rendered by ``server/report.py`` with autoescape: every value in it is text, never markup.
"""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --paper: #ffffff; --panel: #f5f7f9; --ink: #1a1f26; --muted: #58626d; --rule: #d8dde3;
  --warn: #8a5a00; --warn-panel: #fff7e3; --shade: 11, 92, 173;
  --c0: #0b66b8; --c1: #c2410c; --c2: #0a7d5b; --c3: #a63f86;
  --c4: #8a6d00; --c5: #5b50c7; --c6: #4f7d00; --c7: #7b4b2a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161b; --panel: #1a2027; --ink: #e6e9ec; --muted: #9ea9b4; --rule: #333d47;
    --warn: #e5b454; --warn-panel: #282211; --shade: 86, 160, 230;
    --c0: #5fb0f2; --c1: #ff9561; --c2: #45cc9f; --c3: #ea9ccb;
    --c4: #e0c040; --c5: #aaa6ff; --c6: #a8d05a; --c7: #d6aa83;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: .2rem 0 .8rem; }
h2 {
  font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .7rem; border-top: 1px solid var(--rule);
}
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
.eyebrow, .small, figcaption, small { color: var(--muted); font-size: .85rem; }
.eyebrow { margin: 0; }
.lead { font-size: 1.08rem; }
.cards { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.cards { margin: 1.2rem 0; padding: 0; }
.cards div { background: var(--panel); border-radius: .4rem; padding: .7rem .9rem; }
.cards dt { color: var(--muted); font-size: .85rem; }
.cards dd { margin: 0; font-size: .85rem; color: var(--muted); }
.cards dd.figure { font-size: 1.7rem; line-height: 1.3; color: var(--ink); font-weight: 600; }
.cards dd.figure { font-variant-numeric: tabular-nums; }
.notice {
  background: var(--warn-panel); border-left: .25rem solid var(--warn); margin: .6rem 0;
  padding: .55rem .9rem; max-width: none;
}
.notice strong { color: var(--warn); }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th small, td small { display: block; font-weight: 400; white-space: nowrap; }
tbody th { text-align: left; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody + tbody { border-top: 1px solid var(--ink); }
.text { text-align: left; }
td.text:last-child { overflow-wrap: anywhere; min-width: 9rem; }
.figures thead th:first-child, .figures tbody th {
  position: sticky; left: 0; background: var(--paper); text-align: left;
}
.figures tbody th { min-width: 7rem; }
.figures small { font-size: .78rem; }
.confusion td { text-align: center; min-width: 3.6rem; }
.confusion td.hit { outline: 2px solid var(--ink); outline-offset: -2px; }
.confusion td small { color: inherit; }
.confusion thead th { text-align: center; }
.confusion tbody td { border: 1px solid var(--paper); }
.charts { display: grid; gap: 1rem 1.6rem; grid-template-columns: 1fr; }
@media (min-width: 48rem) { .charts { grid-template-columns: 1fr 1fr; } }
figure { margin: .2rem 0; max-width: 32rem; }
figcaption { margin-bottom: .3rem; }
figcaption strong { color: var(--ink); display: block; font-size: .95rem; }
figure svg { display: block; width: 100%; height: auto; font-family: inherit; }
figure svg * { stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; }
.legend { margin: .5rem 0; font-size: .9rem; }
.legend svg { width: 2rem; height: .7rem; vertical-align: middle; margin-right: .35rem; }
.settings { columns: 2 19rem; column-gap: 2.5rem; margin: .5rem 0; font-size: .92rem; }
.settings div {
  display: flex; gap: 1rem; justify-content: space-between; break-inside: avoid;
  border-bottom: 1px solid var(--rule); padding: .18rem 0;
}
.settings dt { color: var(--muted); flex: none; max-width: 65%; }
.settings dd { margin: 0; text-align: right; min-width: 0; overflow-wrap: anywhere; }
code { font: .88rem ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; margin: .6rem 0; }
ul.methods { padding-left: 1.2rem; max-width: 46rem; }
ul.methods li { margin: .3rem 0; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: .8rem; }
</style>
</head>
<body>

{% macro dash_line(index) -%}
<svg viewBox="0 0 32 10" aria-hidden="true"><line x1="0" y1="5" x2="32" y2="5"
 style="stroke: var(--{{ 'ink' if index is none else 'c%d' % (index % num_colours) }});
 stroke-width: {{ 3 if index is none else 2 }}"
 {%- if index is not none %} stroke-dasharray="{{ dashes[index % dashes|length]|join(' ') }}"
 {%- endif %}/></svg>
{%- endmacro %}

{% macro swatch(colour, opacity) -%}
<svg viewBox="0 0 32 10" aria-hidden="true"><rect width="32" height="10"
 style="fill: var(--{{ colour }}); opacity: {{ opacity }}"/></svg>
{%- endmacro %}

{% macro figure(cell) -%}
{{ cell.text }}{% if cell.note %}<sup>{{ cell.note }}</sup>{% endif %}
{%- endmacro %}

{% macro small(text) -%}{% if text %}<small>{{ text }}</small>{% endif %}{%- endmacro %}

{% macro figure_rows(rows) %}
{% for row in rows %}
<tr><th scope="row">{{ row.label }}{{ small(row.detail) }}</th>
{% for cell in row.cells %}
<td>{{ figure(cell) }}{{ small(cell.detail) }}</td>
{% endfor %}
</tr>
{% endfor %}
{% endmacro %}

{% macro figure_table(caption, columns, bodies) %}
<p class="small">{{ caption }}</p>
<div class="scroll" tabindex="0" role="region" aria-label="{{ caption }}">
<table class="figures">
<thead><tr><th scope="col"></th>
{% for column in columns %}
<th scope="col">{{ column.title }}{{ small(column.detail) }}</th>
{% endfor %}
</tr></thead>
{% for rows in bodies %}
<tbody>
{{ figure_rows(rows) }}
</tbody>
{% endfor %}
</table></div>
{% endmacro %}

{% macro site_table(caption, sites_caption, columns, summary_rows, site_rows) %}
{% if few_sites %}
{{ figure_table(caption, columns, [summary_rows, site_rows]) }}
{% else %}
{{ figure_table(caption, columns, [summary_rows]) }}
<details><summary>Each of the {{ site_rows|length }} sites</summary>
{{ figure_table(sites_caption, columns, [site_rows]) }}
</details>
{% endif %}
{% endmacro %}

{% macro settings(pairs) %}
<dl class="settings">
{% for name, value in pairs %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endmacro %}

<header>
<p class="eyebrow">Federated training report</p>
<h1>{{ heading }}</h1>
{% for sentence in headline %}
<p{% if loop.first %} class="lead"{% endif %}>{{ sentence }}</p>
{% endfor %}
<dl class="cards">
{% for card in cards %}
<div><dt>{{ card.label }}</dt><dd class="figure">{{ figure(card) }}</dd>
<dd>{{ card.detail }}</dd></div>
{% endfor %}
</dl>
{% for title, text in notices %}
<p class="notice" role="note"><strong>{{ title }}</strong> {{ text }}</p>
{% endfor %}
</header>

<main>
<section aria-labelledby="results">
<h2 id="results">Test results</h2>
{{ site_table(table_caption, "Test split, each site", columns, summary_rows, site_rows) }}
{% for reason, letter in notes.items() %}
<p class="small"><sup>{{ letter }}</sup> {{ reason }}</p>
{% endfor %}

<h3>Sensitivity by class</h3>
{{ site_table("Test images of a class that the model recognised, of all of that class.",
 "Sensitivity by class, each site", class_columns, class_summary_rows, class_site_rows) }}

<h3>Confusion matrix, all sites pooled</h3>
{% if confusion %}
<p class="small">Images by true class (rows) and predicted class (columns), with the share of the
row, which the shade shows. Outlined: correct.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">
<table class="confusion">
<thead><tr><th scope="col" class="text">true \\ predicted</th>
{% for name in classes %}
<th scope="col">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in confusion %}
<tr><th scope="row">{{ classes[loop.index0] }}</th>
{% for cell in row %}
<td{% if cell.hit %} class="hit"{% endif %}
 style="background: rgba(var(--shade), {{ cell.shade }})">{{ cell.count }}
{%- if cell.share is not none %}<small>{{ cell.share }}</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<p>Not recorded in the summary of this run.</p>
{% endif %}
</section>

<section aria-labelledby="course">
<h2 id="course">Course of training</h2>
<p>{{ course }}</p>
<ul class="legend" aria-label="Lines of the charts">
<li>{{ dash_line(none) }}All sites</li>
{% for name in named_sites %}
<li>{{ dash_line(site_index[name]) }}{{ name }}</li>
{% endfor %}
{% if spread_sites %}
<li>{{ swatch("muted", 0.22) }}range of the {{ spread_sites }} other sites
 (darker: middle half)</li>
{% endif %}
</ul>
<div class="charts">
{% for chart in charts %}
<figure><figcaption><strong>{{ chart.title }}</strong>{{ chart.detail }}</figcaption>
{% if chart.svg %}{{ chart.svg }}{% else %}<p>No values were recorded.</p>{% endif %}
</figure>
{% endfor %}
</div>
</section>

{% if partition %}
<section aria-labelledby="data">
<h2 id="data">Data by site</h2>
<p>{{ partition.text }}</p>
<ul class="legend" aria-label="Classes">
{% for name in partition.classes %}
<li>{{ swatch("c%d" % (loop.index0 % num_colours), opacity(loop.index0)) }}{{ name }}</li>
{% endfor %}
</ul>
<figure>{{ partition.svg }}</figure>
<details{% if few_sites %} open{% endif %}><summary>Number of {{ partition.what }}</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Number of {{ partition.what }}">
<table><thead><tr><th scope="col" class="text">Site</th>
{% for column in partition.columns %}
<th scope="col">{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in partition.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
</section>
{% endif %}

<section aria-labelledby="contributions">
<h2 id="contributions">Who contributed when</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Who contributed when">
<table><thead><tr><th scope="col" class="text">Site</th><th scope="col">Rounds</th>
<th scope="col" class="text">Which</th></tr></thead>
<tbody>
{% for site in contributions %}
<tr><th scope="row">{{ site.site }}</th><td>{{ site.count }}</td>
<td class="text">{{ site.rounds }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if more_sites %}<p>{{ more_sites }} more sites are in history.jsonl.</p>{% endif %}
</section>

<section aria-labelledby="replies">
<h2 id="replies">Replies that were not used</h2>
{% if replies %}
<p>Refused: the site's policy declined. Dropped: the coordinator's checks rejected the reply.
Missing: no reply came in time.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Replies that were not used">
<table><thead><tr><th scope="col" class="text">Site</th><th scope="col" class="text">Status</th>
<th scope="col" class="text">Rounds</th><th scope="col" class="text">Reason</th></tr></thead>
<tbody>
{% for reply in replies %}
<tr><th scope="row">{{ reply.site }}</th><td class="text">{{ reply.status }}</td>
<td class="text">{{ reply.rounds }}</td><td class="text">{{ reply.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if more_replies %}<p>{{ more_replies }} more kinds are in history.jsonl.</p>{% endif %}
{% else %}
<p>None: every reply of every round was used.</p>
{% endif %}
</section>

<section aria-labelledby="methods">
<h2 id="methods">How to read the figures</h2>
<ul class="methods">
{% for text in methods %}
<li>{{ text }}</li>
{% endfor %}
</ul>
</section>

<section aria-labelledby="run">
<h2 id="run">Run</h2>
<h3>Configuration</h3>
{{ settings(run_config) }}
{% if scenario %}
<h3>Scenario</h3>
{{ settings(scenario) }}
{% endif %}
<h3>Provenance</h3>
{{ settings(provenance) }}
{% if command %}
<p class="small">Command: <code>{{ command }}</code></p>
{% endif %}
<h3>Versions</h3>
{{ settings(versions) }}
</section>
</main>

<footer>
<p class="small">Research software, not a medical device: not for diagnosis or treatment. Made from
the files of the run directory alone.</p>
</footer>
</body>
</html>
"""
