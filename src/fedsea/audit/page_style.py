"""How an audit's page looks: on a screen, light or dark, and on paper."""

# The colours of curves are Okabe and Ito's, which people with any kind of colour vision can tell apart.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --soft: #5d6673; --paper: #fff; --line: #d5dae1; --wash: #f4f6f8;
  --hit: #ffd9a0; --hit-line: #a04a00; --alarm: #a04a00;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805a; --c3: #a8558a; --c4: #8a6d00; --c5: #3c3c3c; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa4b1; --paper: #15181c;
  --line: #363d46; --wash: #1e2329; --hit: #6b3f00; --hit-line: #ffb454; --alarm: #ffb454;
  --c0: #56b4e9; --c1: #ff9a52; --c2: #2fd6a3; --c3: #e49ac5; --c4: #f0e442; --c5: #cfd3d8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul { margin: .4rem 0 .8rem; max-width: 48rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
.verdict, .found { border-left: .35rem solid var(--alarm); background: var(--wash); padding: .75rem 1rem;
  margin: 1.25rem 0; }
.found { border-color: var(--line); }
.verdict p, .found p { margin: .25rem 0; } .verdict strong { font-size: 1.3rem; } .found strong { font-size: 1.1rem; }
.verdict ul { margin: .25rem 0 0; padding-left: 1.25rem; } code { overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; max-width: 48rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; margin: .5rem 0; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th small { display: block; font-weight: 400; font-size: .8rem; color: var(--soft); max-width: 22rem; }
thead .n { white-space: normal; }
tr.floor td, tr.floor th { color: var(--soft); }
.text { background: var(--wash); border-radius: .3rem; padding: .5rem .75rem; margin: .75rem 0; }
.text td { padding-top: .45rem; } .text th { width: 9.5rem; font-weight: 600; } .text tr:last-child > * { border: 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.said b { background: var(--hit); border-bottom: 2px solid var(--hit-line); font-weight: 600; }
.said i { color: var(--soft); font-style: italic; text-decoration: line-through; text-decoration-thickness: 1px; }
.said u { color: var(--soft); text-decoration: none; }
.answer { border-left: 2px solid var(--line); padding-left: .3rem; margin-left: .15rem; }
@media (max-width: 56rem) { .figures, .figures > *, .figures tr, .figures th, .figures td { display: block; }
  .figures thead { display: none; } .figures tr { border-bottom: 1px solid var(--line); padding: .35rem 0; }
  .figures th, .figures td { border: 0; padding: .1rem 0; } .figures th small { max-width: none; }
  .figures td.n { display: flex; justify-content: space-between; gap: 1rem; }
  .figures td.n::before { content: attr(data-label); color: var(--soft); }
  .text, .text tbody, .text tr, .text th, .text td { display: block; width: auto; } .text th { border: 0; } }
figure { margin: 1rem 0; } svg { width: 100%; max-width: 46rem; height: auto; }
svg text { font-size: 11px; fill: var(--ink); font-family: inherit; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); fill: none; }
svg g { fill: none; stroke-width: 1.8; } svg g .full { fill: currentColor; stroke: none; }
svg .bound { stroke: var(--soft); stroke-width: 1.3; }
svg .c0 { color: var(--c0); stroke: var(--c0); } svg .c1 { color: var(--c1); stroke: var(--c1); }
svg .c2 { color: var(--c2); stroke: var(--c2); } svg .c3 { color: var(--c3); stroke: var(--c3); }
svg .c4 { color: var(--c4); stroke: var(--c4); } svg .c5 { color: var(--c5); stroke: var(--c5); }
pre { background: var(--wash); padding: .6rem .75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
details > summary { cursor: pointer; font-weight: 600; margin: 1rem 0 .25rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  tr, figure, .verdict, .found { break-inside: avoid; } h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
