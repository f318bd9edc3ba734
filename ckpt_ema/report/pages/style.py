"""The style sheet of the pages: phones and paper, light and dark."""

from ckpt_ema.report.figure_style import COLOURS

DASHES = ("none", "7 4", "2 3", "8 3 2 3")  # in pixels, of lines that share a chart

_ON_DARK = {"#000000": "#f0f3f6"}  # where the background is dark


def _colours(changed: dict[str, str]) -> str:
    return "".join(f"--c{n}:{changed.get(one, one)};" for n, one in enumerate(COLOURS))


_LIGHT = (
    "color-scheme:light;--ink:#1c2128;--soft:#59636e;--page:#fff;--panel:#f4f6f8;--line:#d5dbe1;"
    f"--grid:#e4e8ec;--alert:#8a4b00;--alert-panel:#fff5e0;--alert-line:#e0a030;{_colours({})}"
)
_DARK = (
    "color-scheme:dark;--ink:#e6eaef;--soft:#9aa5b1;--page:#10151b;--panel:#1a2129;--line:#343d47;"
    f"--grid:#262e37;--alert:#f2c063;--alert-panel:#2b2314;--alert-line:#a97a1e;{_colours(_ON_DARK)}"
)

STYLE = (
    f":root{{{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + "".join(f".c{number}{{color:var(--c{number})}}" for number in range(len(COLOURS)))
    + "".join(f".d{number}.line{{stroke-dasharray:{dash}}}" for number, dash in enumerate(DASHES))
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,footer{max-width:52rem;margin:0 auto;padding:0 1rem}
main{padding-top:1.5rem}
footer{margin-top:3rem;padding-bottom:2rem;color:var(--soft);font-size:.8125rem}
h1,h2,h3,p,dt,dd,li,summary,th,td,figcaption{overflow-wrap:anywhere}
h1{margin:0 0 .5rem;font-size:1.75rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:2.5rem 0 .75rem;font-size:1.25rem;line-height:1.3}
h3{margin:1.5rem 0 .5rem;font-size:1rem}
p{margin:0 0 .75rem}
.lead{font-size:1.125rem;color:var(--soft)}
.soft{color:var(--soft)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:.875em}
pre{margin:0 0 .75rem;padding:.75rem 1rem;background:var(--panel);border:1px solid var(--line);
 border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;user-select:all;
 -webkit-user-select:all}
pre code{font-size:.8125rem}
.alert{margin:1.25rem 0;padding:.75rem 1rem;background:var(--alert-panel);
 border:1px solid var(--alert-line);border-left-width:4px;border-radius:6px}
.alert h2{margin:0 0 .25rem;font-size:1rem;color:var(--alert)}
ul{margin:0;padding-left:1.25rem}
li+li{margin-top:.25rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.75rem 1.5rem;
 margin:1rem 0}
dt{color:var(--soft);font-size:.8125rem}
dt::first-letter{text-transform:uppercase}
dd{margin:0;font-variant-numeric:tabular-nums}
figure{margin:1rem 0 1.25rem}
figcaption{margin-bottom:.5rem;color:var(--soft);font-size:.875rem}
.frame{position:relative;margin:0 1.25rem 1.5rem 3.25rem}
.plot{display:block;width:100%;height:13rem;overflow:visible}
.plot.plane{height:auto;aspect-ratio:3/2}
figure path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.line{stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dot{stroke:currentColor;stroke-width:7;stroke-linecap:round}
.ring{stroke:var(--ink);stroke-width:13;stroke-linecap:round}
.bar{fill:currentColor;shape-rendering:crispEdges}
.tick{position:absolute;color:var(--soft);font-size:.75rem;line-height:1;white-space:nowrap;
 font-variant-numeric:tabular-nums}
.tick.y{right:100%;margin-right:.5rem;transform:translateY(50%)}
.tick.x{top:100%;margin-top:.5rem;transform:translateX(-50%)}
.below{margin:0;color:var(--soft);font-size:.8125rem;text-align:center}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.75rem 0 0;padding:0;
 list-style:none;font-size:.8125rem}
.legend li{margin:0}
.swatch{width:2rem;height:.75rem;margin-right:.4rem;vertical-align:-.1rem}
.scroll{overflow-x:auto;margin-bottom:.75rem}
table{width:100%;table-layout:fixed;border-collapse:collapse;font-size:.875rem;line-height:1.35;
 font-variant-numeric:tabular-nums}
th,td{padding:.3rem 0 .3rem .6rem;border-bottom:1px solid var(--line);text-align:left;
 vertical-align:top;font-weight:inherit}
th:first-child,td:first-child{padding-left:0}
thead th{color:var(--soft);vertical-align:bottom;overflow-wrap:normal}
.number{text-align:right}
td.number{white-space:nowrap}
.chosen>*{background:var(--panel);font-weight:600}
.hidden thead{display:none}
details{margin:.75rem 0}
.scroll details{margin:0}
.scroll summary{padding:.3rem 0;border-bottom:1px solid var(--line);font-size:.875rem}
summary{cursor:pointer;color:var(--soft)}
section{margin-top:2.5rem}
section>h2:first-child{margin-top:0}
@media (max-width:40rem){table{font-size:.8125rem}.frame{margin-left:2.75rem}}
@media print{
 body{font-size:10pt}
 table{font-size:.75rem}
 main,footer{max-width:none;padding-left:0;padding-right:0}
 h1,h2,h3,summary{break-after:avoid}
 figure,tr,pre,dl>div,.alert{break-inside:avoid}
 thead{display:table-header-group}
 .plot,.swatch,.alert,.chosen>*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 details::details-content{content-visibility:visible;block-size:auto}
 .scroll{overflow:visible}
 .scroll summary{display:none}
 summary{list-style:none}
}
@page{margin:18mm 16mm}
"""
)
