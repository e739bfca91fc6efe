"""The report's style sheet: light and dark, narrow and wide. Colours of plots are c0 to c6."""

CSS = """
:root {
  color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1a2130; --soft: #5d6879;
  --edge: #e2e6ec; --grid: #e9ecf1; --good: #18794e; --bad: #c0362c; --unsure: #946800;
  --tint: #f0f3f9; --on: #ffffff; --c0: #2f66d6; --c1: #dd7222; --c2: #1f9a7c; --c3: #a5519c;
  --c4: #c79a1b; --c5: #8592a6; --c6: #d0485a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #191f29; --ink: #e7ebf2; --soft: #98a4b5; --edge: #2a3240;
    --grid: #262e3a; --good: #5cc795; --bad: #f0857c; --unsure: #dfb54a; --tint: #202835;
    --on: #0e1218; --c0: #74a2ff; --c1: #f29a56; --c2: #4fc7a8; --c3: #d18acb; --c4: #e0bd55;
    --c5: #8b98ab; --c6: #f07f8d;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1280px; margin: 0 auto; padding: 40px 24px 72px }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -.01em }
h3 { font-size: 14px; margin: 0; font-weight: 600 }
p { margin: 0 }
.lead, .note, .sub { color: var(--soft) }
.lead { margin-bottom: 16px; max-width: 76ch }
.note { font-size: 12.5px; line-height: 1.45; margin-top: 8px }
.sub { margin-top: 6px }
.grid {
  display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr));
}
.small-grid { display: grid; gap: 14px; margin-top: 12px; grid-template-columns: repeat(5, 1fr) }
.four { grid-template-columns: repeat(4, 1fr) }
@media (max-width: 900px) {
  .small-grid { grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)) }
}
.card {
  background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 16px 18px;
  min-width: 0;
}
.wide { grid-column: 1 / -1 }
.stack > .card { margin-bottom: 16px }
.head {
  display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline;
  gap: 2px 12px; margin-bottom: 8px;
}
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft) }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums }
i.swatch { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 6px }
.tiles { display: grid; gap: 16px; margin-top: 24px; grid-template-columns: repeat(7, 1fr) }
.tiles .wider { grid-column: span 2 }
@media (max-width: 1000px) {
  .tiles { grid-template-columns: repeat(auto-fit, minmax(min(220px, 100%), 1fr)) }
  .tiles .wider { grid-column: auto }
}
.label { font-size: 12.5px; color: var(--soft); font-weight: 500 }
.value {
  font-size: 23px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.value .from { color: var(--soft); font-weight: 500 }
.up { color: var(--good) }
.down { color: var(--bad) }
.plot { display: block; width: 100%; height: auto }
.tick { font-size: 11px; fill: var(--soft) }
.grid > .card { display: flex; flex-direction: column }
.rule { stroke: var(--grid); fill: none }
.line, .raw, .spark { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round }
.line { stroke-width: 2.2 }
.raw { stroke-width: 1; opacity: .32 }
.spark { stroke-width: 1.4 }
.point { fill: var(--card); stroke: var(--c); stroke-width: 2 }
.hover { fill: var(--c); opacity: 0 }
.hover:hover { opacity: 1 }
.area { fill: var(--c); opacity: .78 }
.bar, .cell { fill: var(--c) }
.frame { fill: var(--tint) }
.cell-text { font-size: 8.5px; fill: var(--ink) }
.strong { fill: var(--on) }
.sparkline { display: block }
.c0 { --c: var(--c0) }
.c1 { --c: var(--c1) }
.c2 { --c: var(--c2) }
.c3 { --c: var(--c3) }
.c4 { --c: var(--c4) }
.c5 { --c: var(--c5) }
.c6 { --c: var(--c6) }
.swatch { background: var(--c) }
.empty {
  color: var(--soft); background: var(--tint); border-radius: 8px; padding: 22px 18px; flex: 1;
  display: flex; align-items: center; justify-content: center; text-align: center;
}
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: middle }
tr:last-child td { border-bottom: 0 }
th:last-child, td:last-child { padding-right: 0 }
.num { text-align: right; font-variant-numeric: tabular-nums }
td.range { width: 46%; min-width: 160px; padding-right: 24px }
.track { position: relative; height: 14px }
.track::before {
  content: ""; position: absolute; left: 0; right: 0; top: 6px; height: 2px;
  background: var(--grid);
}
.track span { position: absolute }
.gain { top: 5px; height: 4px; border-radius: 2px; opacity: .55 }
.before, .after { top: 1px; width: 12px; height: 12px; margin-left: -6px; border-radius: 50% }
.before { background: var(--card); border: 2px solid var(--c5) }
.after { background: var(--c0) }
.shares {
  display: flex; height: 26px; border-radius: 7px; overflow: hidden; gap: 2px; margin-bottom: 14px;
}
.group { display: grid; grid-template-columns: 190px 1fr; gap: 24px }
@media (max-width: 720px) {
  .group { grid-template-columns: 1fr }
}
.images img {
  display: block; max-width: 100%; border-radius: 8px; border: 1px solid var(--edge);
  margin-bottom: 8px;
}
.images .pixels { width: 150px; image-rendering: pixelated }
.question { font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere }
dl {
  display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; font-size: 13px; margin: 10px 0 0;
}
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere; font-weight: 600 }
.answers {
  display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); align-content: start;
}
.answer {
  border: 1px solid var(--edge); border-left: 4px solid var(--c); border-radius: 8px;
  padding: 9px 12px; min-width: 0;
}
.correct { --c: var(--good) }
.wrong { --c: var(--bad) }
.could_not_judge { --c: var(--unsure) }
.verdict {
  display: flex; justify-content: space-between; gap: 10px; font-size: 12.5px; color: var(--soft);
}
.verdict b { color: var(--c) }
.verdict span:last-child { white-space: nowrap }
pre {
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em;
  overflow-y: auto;
}
details > pre { max-height: none }
summary { cursor: pointer; font-weight: 600; font-size: 14px }
details.card { margin-top: 16px }
.group details { margin-top: 10px }
.group summary { font-size: 13px; color: var(--soft); margin-bottom: 10px }
@media print {
  .card { break-inside: avoid }
}
"""
