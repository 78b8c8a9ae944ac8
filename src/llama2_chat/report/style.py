"""The page's style sheet: light, at most 900 pixels wide, readable on a telephone and on paper."""

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #636c76; --line: #d9dee3; --tint: #f5f7f9; --a: #2563a8;
  --b: #c2571a; --good: #1a7f4b; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 74ch; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .9em; }
.soft, figcaption, .interval { color: var(--soft); }
.soft, figcaption { font-size: 13px; }
.interval { font-size: 12px; white-space: nowrap; display: block; }
.notice { background: #fff6e0; border-left: 3px solid #d99a00; padding: 8px 12px; margin: 12px 0; }
.notice ul { margin: 0; padding-left: 18px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; font-size: 14px; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; padding: 5px 0 5px 18px; }
td.number { white-space: nowrap; }
.number + :not(.number) { padding-left: 28px; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.run-a { color: var(--a); font-weight: 600; } .run-b { color: var(--b); font-weight: 600; }
figure { margin: 0; } .figures { display: flex; flex-wrap: wrap; gap: 14px 20px; margin: 8px 0 12px; }
.figures figure { flex: 1 1 340px; max-width: 430px; min-width: 0; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: inherit !important; }
.wide { overflow-x: auto; margin: 10px 0; } .wide svg { min-width: 330px; max-width: 620px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 0 24px; }
.columns > div { min-width: 0; }
.bar { display: inline-block; height: 10px; background: var(--a); border-radius: 2px; vertical-align: middle; }
.bars td:nth-child(2) { width: 40%; min-width: 110px; }
.bars table { width: 100%; }
.sample { margin: 14px 0 20px; break-inside: avoid; }
.prompt { background: var(--tint); border-left: 3px solid #aab4be; padding: 7px 12px; overflow-wrap: anywhere;
  white-space: pre-wrap; }
.prompt .role { color: var(--soft); font-size: 12px; margin-right: 8px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 8px; margin-top: 8px; }
.answer { border: 1px solid var(--line); border-radius: 4px; padding: 7px 10px; min-width: 0; }
.answer h4 { margin: 0 0 3px; font-size: 13px; overflow-wrap: anywhere; }
.answer p { margin: 0 0 5px; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer .scores { font-size: 12px; color: var(--soft); }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--a); font-size: 14px; }
pre { background: var(--tint); padding: 12px; overflow-x: auto; font-size: 12px; line-height: 1.45; }
@media (max-width: 520px) { .scroll th:first-child, .scroll td:first-child { position: sticky; left: 0;
  background: #fff; } main { padding: 18px 14px 36px; } h1 { font-size: 22px; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: 6px; } }
@media print { main { max-width: none; padding: 0; } body { font-size: 11pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll, .wide { overflow: visible; } summary { color: var(--ink); } }
"""
