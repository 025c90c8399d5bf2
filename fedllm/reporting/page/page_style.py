"""The style sheet of the report page: light and dark, narrow screens, paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #4d5660; --line: #d5d9de;
  --accent: #1f5fc4; --warn-paper: #fff4e5; --warn-ink: #6b3c00; --warn-line: #e0a24a;
  --series-0: #1f5fc4; --series-1: #b4500a; --series-2: #0f7048; --series-3: #6d45c4;
  --series-4: #b02a63; --series-5: #0a6a7d; --series-6: #74560f; --series-7: #545b66;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --card: #1d2128; --ink: #e6e9ed; --soft: #a9b2bd; --line: #3b424c;
    --accent: #8ab6ff; --warn-paper: #33260f; --warn-ink: #ffd9a0; --warn-line: #8a6420;
    --series-0: #8ab6ff; --series-1: #ffab70; --series-2: #66d3a6; --series-3: #bfa5ff;
    --series-4: #ff94bd; --series-5: #66cfe3; --series-6: #dcbd68; --series-7: #aeb6c1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
header, nav, main, footer { max-width: 70rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: 1rem 0 0;
  list-style: none; }
nav a { display: inline-block; padding: .2rem 0; }
.notice { background: var(--warn-paper); color: var(--warn-ink); border: 1px solid var(--warn-line);
  border-radius: .4rem; padding: .6rem .9rem; margin: 1rem 0; max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0 0; padding: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.facts dd small { display: block; color: var(--soft); font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; margin: .75rem 0; }
.charts:has(> :only-child) { max-width: 33rem; }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .75rem;
  break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round;
  stroke-linecap: butt; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .4rem; }
summary { cursor: pointer; padding: .5rem .8rem; }
summary:focus-visible, a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
.scroll { overflow-x: auto; padding: 0 .8rem; }
.under { padding: 0 .8rem; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
th, td { text-align: right; padding: .25rem .7rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; }
td.long { white-space: pre-wrap; min-width: 12rem; max-width: 24rem; }
pre { background: var(--card); border-radius: .4rem; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
footer { margin-top: 3rem; padding-bottom: 2rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 30rem) {
  .facts { grid-template-columns: 1fr 1fr; }
  .facts dd { font-size: 1.05rem; }
  figure { padding: .5rem; }
}
@media print {
  :root { color-scheme: light; --paper: #ffffff; --card: #ffffff; --ink: #1b1f24; --soft: #4d5660;
    --line: #d5d9de; --accent: #1f5fc4; --warn-paper: #ffffff; --warn-ink: #6b3c00;
    --series-0: #1f5fc4; --series-1: #b4500a; --series-2: #0f7048; --series-3: #6d45c4;
    --series-4: #b02a63; --series-5: #0a6a7d; --series-6: #74560f; --series-7: #545b66; }
  body { font-size: 11px; }
  nav, .skip, .csv, details:not([open]) { display: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  .charts:has(> :only-child) { grid-template-columns: 1fr; max-width: 24rem; }
  figure, .facts div { border: 1px solid var(--line); }
  .scroll, pre { overflow: visible; }
  th, td { white-space: normal; }
  pre { white-space: pre-wrap; }
  tr { break-inside: avoid; }
}
"""
