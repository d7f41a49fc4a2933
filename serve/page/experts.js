// The experts' side: a grid of layers by experts that lights up with each token, and each layer's load.

const FADE_MS = 450;
const LABEL = 26; // pixels left of the grid, for the layers' numbers
const PAD = 4; // pixels above and below, so that no number is cut
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 56rem)");

/** A canvas as sharp as the screen, cleared: its context and its width in CSS pixels. */
function sharpen(canvas, height) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return { pen, width };
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["cell", "load", "lit", "quiet"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
}

/** Entropy of counts as a share of its most; null where there is nothing to tell. */
export function entropy(counts) {
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total || counts.length < 2) return null;
  return counts.reduce((sum, n) => (n ? sum - (n / total) * Math.log(n / total) : sum), 0) / Math.log(counts.length);
}

export class Experts {
  /** @param onCell called with {layer, expert}, or null, when a cell is clicked. */
  constructor(onCell) {
    this.grid = document.getElementById("grid");
    this.cellLine = document.getElementById("cell");
    this.cellHelp = this.cellLine.textContent;
    this.title = document.getElementById("token-title");
    this.help = document.getElementById("token-help");
    this.list = document.getElementById("token-layers");
    this.loads = document.getElementById("loads");
    this.loadHelp = document.getElementById("load-help");
    this.counts = []; // of each layer and expert
    this.heat = []; // when each was last used, milliseconds
    this.latest = []; // for each layer the set of experts of the last token
    this.looked = null; // the same of the token looked at
    this.marked = null;
    this.figures = [];
    this.drawn = 0;
    this.grid.addEventListener("pointermove", (event) => this.point(event));
    this.grid.addEventListener("pointerleave", () => this.tellCell(this.marked));
    this.grid.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      const same = cell && this.marked && cell.layer === this.marked.layer && cell.expert === this.marked.expert;
      this.marked = same ? null : cell;
      this.tellCell(this.marked);
      onCell(this.marked);
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(this.grid.parentElement);
    dark.addEventListener("change", () => this.draw());
  }

  /** The model's shape: experts of each MoE layer. Without it the grid grows as experts are seen. */
  shape(experts, topK) {
    experts.forEach((count, layer) => this.grow(layer, count - 1));
    const text = document.getElementById("shape");
    const kinds = [...new Set(experts)];
    const layers = `${experts.length} layer${experts.length === 1 ? "" : "s"}`;
    const each = kinds.length === 1 ? `${kinds[0]} experts in each of ${layers}` : `${experts.join(", ")} experts in ${layers}`;
    const few = topK === 1 ? "one of them computes" : `${topK} of them compute`;
    if (experts.length) text.textContent = topK ? `${each}; ${few} each token.` : `${each}.`;
    else text.textContent = "This model has no experts: all of it computes each token.";
    this.draw();
  }

  grow(layer, expert) {
    while (this.counts.length <= layer) {
      this.counts.push([]);
      this.heat.push([]);
    }
    while (this.counts[layer].length <= expert) {
      this.counts[layer].push(0);
      this.heat[layer].push(-Infinity);
    }
  }

  clear() {
    this.counts.forEach((row) => row.fill(0));
    this.heat.forEach((row) => row.fill(-Infinity));
    this.latest = [];
    this.marked = null;
    this.look(null);
    this.tellCell(null);
  }

  /** Tokens that were just computed. */
  light(routes, now = performance.now()) {
    for (const layers of routes) {
      layers.forEach((experts, layer) => {
        for (const expert of experts) {
          this.grow(layer, expert);
          this.counts[layer][expert] += 1;
          this.heat[layer][expert] = now;
        }
      });
    }
    if (!routes.length) return;
    this.latest = routes.at(-1).map((experts) => new Set(experts));
    this.draw();
  }

  /** Shows the experts of one token; null: of the last one that came. */
  look(token) {
    this.list.replaceChildren();
    this.looked = null;
    this.help.hidden = Boolean(token);
    this.title.textContent = "Token";
    if (token) {
      const layers = token.routes[0]?.length ?? 0;
      this.looked = Array.from({ length: layers }, (_, i) => new Set(token.routes.flatMap((one) => one[i])));
      const many = token.routes.length > 1 ? ` (${token.routes.length} tokens)` : "";
      this.title.textContent = `Token ${JSON.stringify(token.text)}${many}`;
      this.list.append(...this.looked.map((experts, layer) => {
        const item = document.createElement("li");
        const name = document.createElement("b");
        name.textContent = [...experts].sort((a, b) => a - b).join(", ");
        item.append(`Layer ${layer}: `, name);
        return item;
      }));
    }
    this.draw();
  }

  /** Draws with the next frame, and goes on while something fades. */
  draw() {
    if (this.drawn) return;
    this.drawn = requestAnimationFrame((now) => {
      this.drawn = 0;
      const fading = this.drawGrid(now);
      this.drawLoads();
      if (fading) this.draw();
    });
  }

  measure() {
    const widest = Math.max(1, ...this.counts.map((row) => row.length));
    const room = narrow.matches ? 150 : 340;
    const height = Math.min(18, Math.max(3, Math.floor(room / Math.max(1, this.counts.length))));
    return { height, width: (this.grid.clientWidth - LABEL) / widest };
  }

  drawGrid(now) {
    const cell = this.measure();
    const tall = this.counts.length * cell.height + 2 * PAD;
    this.grid.style.height = `${tall}px`;
    const { pen } = sharpen(this.grid, tall);
    const colour = colours();
    const gap = cell.width > 6 ? 2 : cell.width > 3 ? 1 : 0;
    const every = Math.ceil(12 / cell.height);
    const space = cell.height > 6 ? 2 : 1;
    const lit = this.looked ?? this.latest;
    let fading = false;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    this.counts.forEach((row, layer) => {
      const y = PAD + layer * cell.height;
      const most = Math.max(1, ...row);
      pen.globalAlpha = 1;
      pen.fillStyle = colour.quiet;
      if (layer % every === 0) pen.fillText(layer, 0, y + cell.height / 2);
      row.forEach((count, expert) => {
        const paint = (fill, alpha) => {
          pen.fillStyle = fill;
          pen.globalAlpha = alpha;
          pen.fillRect(LABEL + expert * cell.width, y, cell.width - gap, cell.height - space);
        };
        paint(colour.cell, 1);
        if (count) paint(colour.load, 0.15 + 0.6 * (count / most));
        const age = (now - this.heat[layer][expert]) / FADE_MS;
        if (lit[layer]?.has(expert)) paint(colour.lit, 1);
        else if (!this.looked && age < 1 && !still.matches) {
          paint(colour.lit, 0.5 * (1 - Math.max(0, age)));
          fading = true;
        }
        if (this.marked?.layer === layer && this.marked.expert === expert) {
          pen.globalAlpha = 1;
          pen.strokeStyle = colour.quiet;
          pen.lineWidth = 2;
          pen.strokeRect(LABEL + expert * cell.width, y, cell.width - gap, cell.height - space);
        }
      });
    });
    return fading;
  }

  drawLoads() {
    while (this.figures.length < this.counts.length) {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      const [name, facts] = [document.createElement("span"), document.createElement("span")];
      name.textContent = `Layer ${this.figures.length}`;
      canvas.setAttribute("role", "img");
      caption.append(name, facts);
      figure.append(canvas, caption);
      this.loads.append(figure);
      this.figures.push({ canvas, facts });
    }
    const empty = !this.counts.some((row) => row.some(Boolean));
    this.loads.hidden = empty;
    this.loadHelp.textContent = empty ? "Shows with the first token." : "Tokens by expert since the last clear; experts used; 100 % is even.";
    if (empty) return;
    const colour = colours();
    this.counts.forEach((row, layer) => {
      const { canvas, facts } = this.figures[layer];
      const { pen, width } = sharpen(canvas, canvas.clientHeight - 1);
      const most = Math.max(1, ...row);
      const step = width / Math.max(1, row.length);
      const high = canvas.clientHeight - 1;
      pen.fillStyle = colour.load;
      row.forEach((count, expert) => {
        const tall = (count / most) * high;
        pen.fillRect(expert * step, high - tall, Math.max(1, step - (step > 4 ? 1 : 0)), tall);
      });
      const used = row.filter(Boolean).length;
      const spread = entropy(row);
      facts.textContent = `${used} of ${row.length}${spread === null ? "" : ` · ${Math.round(spread * 100)}\u00a0%`}`;
      facts.title = "experts used; entropy as a share of an even spread";
      canvas.setAttribute("aria-label", `Load of layer ${layer}: ${facts.textContent} even`);
    });
  }

  cellAt(event) {
    const box = this.grid.getBoundingClientRect();
    const cell = this.measure();
    const layer = Math.floor((event.clientY - box.top - PAD) / cell.height);
    const expert = Math.floor((event.clientX - box.left - LABEL) / cell.width);
    return this.counts[layer]?.[expert] === undefined ? null : { layer, expert };
  }

  point(event) {
    this.tellCell(this.cellAt(event) ?? this.marked);
  }

  tellCell(cell) {
    if (!cell) {
      this.cellLine.textContent = this.cellHelp;
      return;
    }
    const row = this.counts[cell.layer];
    const total = row.reduce((a, b) => a + b, 0);
    const share = total ? ` (${((100 * row[cell.expert]) / total).toFixed(1)}\u00a0%)` : "";
    this.cellLine.textContent = `Layer ${cell.layer}, expert ${cell.expert}: ${row[cell.expert]} of ${total} assignments${share}`;
  }
}
