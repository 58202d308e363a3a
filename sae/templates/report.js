// Unpacks the blocks that sae/report/payload.py wrote and shows latents on demand.
// Text of the corpus reaches the page as text nodes only: nothing here parses markup.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };

  // Values of tokens, by pointer or keyboard

  const tip = $("tip");
  const TIPPED = ".s i, [data-tip]";
  let marked = null;
  const show = (token) => {
    if (!token) { tip.style.visibility = "hidden"; return; }
    const box = token.getClientRects()[0];
    if (!box) return;
    tip.classList.toggle("words", "tip" in token.dataset);
    tip.textContent = token.dataset.tip || token.dataset.v;
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 4 : box.bottom + 4) + "px";
    tip.style.visibility = "visible";
  };
  const mark = (token) => {
    if (marked) marked.classList.remove("at");
    marked = token;
    if (token) { token.classList.add("at"); token.scrollIntoView({ block: "nearest" }); }
    show(token);
  };
  const reached = () => marked || document.activeElement?.closest(":focus-visible[data-tip]");  // by keyboard
  document.addEventListener("mouseover", (event) => show(event.target.closest(TIPPED) || reached()));
  document.addEventListener("scroll", () => show(reached()), { passive: true, capture: true });
  document.addEventListener("focusin", () => show(reached()));
  document.addEventListener("focusout", () => mark(null));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select");
    if (event.key === "/" && !typing && $("q")) { event.preventDefault(); $("q").focus(); return; }
    const list = event.target.closest("ol.s");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") { mark(null); return; }
    if (!list || !(step || turn)) return;
    event.preventDefault();
    const peaks = [...list.querySelectorAll("b i")];
    if (!marked || !list.contains(marked)) { mark(peaks[0]); return; }
    const row = marked.closest("li");
    const all = step ? [...row.querySelectorAll("i")] : peaks;
    const at = all.indexOf(step ? marked : row.querySelector("b i"));
    mark(all[Math.max(0, Math.min(all.length - 1, at + (step || turn)))]);
  });
  const reveal = () => {  // a definition that is folded away
    const wanted = document.getElementById(location.hash.slice(1)), folded = wanted?.closest("details:not([open])");
    if (folded) { folded.open = true; wanted.scrollIntoView(); }
  };
  addEventListener("hashchange", reveal);
  reveal();
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((d) => { d.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((d) => { d.open = false; }));
  const ready = () => { document.documentElement.dataset.ready = Math.round(performance.now()); };
  if (!$("block-0")) { ready(); return; }

  // Blocks

  const TYPES = { uint8: Uint8Array, int16: Int16Array, int32: Int32Array, uint32: Uint32Array, float32: Float32Array };
  const unpack = async (number) => {
    const text = atob($(`block-${number}`).textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const data = await new Response(stream).arrayBuffer();
    const size = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
    const arrays = {};
    for (const [name, [type, offset, length]] of Object.entries(header.arrays))
      arrays[name] = new TYPES[type](data, 4 + size + offset, length);
    return { meta: header.meta, ...arrays };
  };
  const blocks = new Map();
  const block = (number) => {
    if (!blocks.has(number)) blocks.set(number, unpack(number));
    return blocks.get(number);
  };

  // Text and numbers

  const QUIET = /(\x01[^\x02]*\x02)/;
  const shown = (text) => text.split(QUIET).filter(Boolean).map((part) =>
    part[0] === "\x01" ? make("u", {}, part.slice(1, -1)) : document.createTextNode(part));
  const plain = (text) => text.replace(/[\x01\x02]/g, "");
  const percent = (share) => {
    const value = 100 * share;
    return (value >= 10 || value === 0 ? value.toFixed(1) : String(Number(value.toPrecision(2)))) + " %";
  };
  const significant = (value) =>
    Number.isInteger(value) || Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  const decimals = (largest) => (largest > 0 ? Math.max(0, Math.min(20, 2 - Math.floor(Math.log10(largest)))) : 3);
  const label = (name) => (name === "latent" ? "number" : meta.labels[name] || name.replaceAll("_", " "));

  // One latent

  let index, meta, tokens;
  const svg = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const histogram = (counts, at, name, said) => {
    const bins = meta.bins;
    const heights = counts.subarray(at * bins, (at + 1) * bins);
    const picture = svg("svg", { class: name, viewBox: `0 0 ${bins} 255`, preserveAspectRatio: "none", role: "img", "aria-label": said });
    heights.forEach((h, i) => picture.append(svg("rect", { x: i + 0.08, y: 255 - h, width: 0.84, height: h })));
    return picture;
  };
  const logits = (b, at, from, kind) => {
    const list = make("ol", { class: `logits ${kind}` });
    const n = meta.n_logits;
    const scale = b.logit_scale[at] / 32767;
    for (let i = at * 2 * n + from; i < at * 2 * n + from + n; i++) {
      const token = make("span", { class: "t", style: `--a:${Math.abs(b.logit[i] / 32767).toFixed(2)}` }, ...shown(tokens[b.logit_token[i]]));
      list.append(make("li", {}, token, make("span", { class: "n" }, (b.logit[i] * scale).toFixed(2))));
    }
    return list;
  };
  const place = new Map();  // latent number -> its place in the index
  const peakText = (i) => {
    const counts = new Map();
    for (let s = index.starts[i]; s < index.starts[i] + index.n_top[i]; s++) {
      const token = index.peak[s];
      counts.set(token, (counts.get(token) || 0) + 1);
    }
    let best = 0, most = 0;
    for (const [token, count] of counts) if (count > most) { best = token; most = count; }
    return tokens[best];
  };
  const nearest = (b, at) => {
    const list = make("ul", { class: "near" });
    const n = meta.n_nearest;
    for (let i = at * n; i < (at + 1) * n; i++) {
      const other = b.nearest[i];
      const text = place.has(other) ? shown(peakText(place.get(other))) : [];
      list.append(make("li", {}, make("a", { href: `#latent-${other}` }, String(other)),
        make("span", { class: "t" }, ...text), make("span", {}, (b.cosine[i] / 1e4).toFixed(2))));
    }
    return list;
  };
  const snippets = (b, first, start, stop, latent, largest, what) => {
    const list = make("ol", { class: "s", tabindex: "0", "aria-label": `${what} of latent ${latent}` });
    const width = meta.width, digits = decimals(largest);
    for (let s = start; s < stop; s++) {
      const at = (s - first) * width;
      const piece = (t) => {
        const token = b.token_low[at + t] | (b.token_high[at + t] << 8) | (b.token_top ? b.token_top[at + t] << 16 : 0);
        if (!token) return [];
        const share = b.share[at + t], text = shown(tokens[token]);
        if (!share && t !== meta.before) return text;
        const value = t === meta.before ? index.value[s] : (share / 255) * largest;
        const where = `position ${b.position[s - first] + t - meta.before} of sequence ${b.sequence[s - first]}`;
        return [make("i", { "data-v": `${value.toFixed(digits)} at ${where}`, style: `--a:${(share / 255).toFixed(2)}` }, ...text)];
      };
      const range = (from, to) => Array.from({ length: to - from }, (_, i) => piece(from + i)).flat();
      list.append(make("li", {},
        make("span", { class: "v" }, index.value[s].toFixed(digits)),
        make("span", { class: "l" }, make("span", {}, ...range(0, meta.before))),
        make("span", { class: "r" }, make("b", {}, ...piece(meta.before)), ...range(meta.before + 1, width))));
    }
    return list;
  };
  const card = async (i) => {
    const latent = index.latent[i], largest = index.largest[i];
    const digits = decimals(largest);
    const fires = index.starts[i + 1] > index.starts[i];
    const column = (name) => (meta.columns.includes(name) ? index[`column ${name}`][i] : NaN);
    const link = (other) => make("a", { href: `#latent-${other}` }, String(other));
    const head = make("header", {}, make("h3", {}, "latent ", link(latent)));
    const said = { density: (v) => `fires on ${percent(v)} of rows`, mean_activation: (v) => `mean when active ${v.toFixed(digits)}`, max_activation: (v) => `largest ${v.toFixed(digits)}` };
    for (const name of Object.keys(said))
      if (fires && Number.isFinite(column(name))) head.append(make("span", {}, said[name](column(name))));
    const more = make("p", { class: "more" });
    for (const name of meta.columns) {
      const value = column(name);
      if (name in said || name === "fires" || !Number.isFinite(value) || (name.startsWith("nearest") && meta.n_nearest)) continue;
      if (name === "partner" && value < 0) continue;  // it has none
      more.append(make("span", {}, `${label(name)} `, make("b", {}, name === "partner" ? link(value) : significant(value))));
    }
    for (const [name, kinds] of Object.entries(meta.words)) more.append(make("span", {}, `${label(name)} `, make("b", {}, kinds[index[`word ${name}`][i]])));
    const article = make("article", { "aria-label": `latent ${latent}`, id: `latent-${latent}` }, head, more);
    const group = Math.floor(i / meta.group), at = i - group * meta.group;
    const b = await block(group + 1);
    const aside = make("aside");
    const start = index.starts[i], stop = index.starts[i + 1], middle = start + index.n_top[i];
    const text = make("div");
    if (fires) {
      aside.append(make("div", {}, make("h4", {}, Number.isFinite(column("fires")) ? `activations on ${column("fires").toLocaleString("en")} rows` : "activations"), histogram(b.histogram, at, "hist", `activations of latent ${latent} by size, from 0 to the largest`),
        make("div", { class: "axis" }, make("span", {}, "0"), make("span", {}, largest.toFixed(digits)))));
      const first = index.starts[group * meta.group];
      text.append(make("h4", {}, "strongest"), snippets(b, first, start, middle, latent, largest, "strongest activations"));
      if (stop > middle)
        text.append(make("h4", {}, "drawn at random, by strength"), snippets(b, first, middle, stop, latent, largest, "random activations"));
    } else text.append(make("p", { class: "note" }, `It fires on none of the ${meta.n_rows.toLocaleString("en")} rows.`));
    if (meta.n_logits) {
      const value = (i) => (b.logit[at * 2 * meta.n_logits + i] * b.logit_scale[at] / 32767).toFixed(2);
      aside.append(make("div", {}, make("h4", {}, "effects on logits"),
        histogram(b.logit_histogram, at, "hist thin", `effects of latent ${latent} on the logits of all tokens, by size`),
        make("div", { class: "axis" }, make("span", {}, value(meta.n_logits)), make("span", {}, value(0))),
        make("div", { class: "pair" }, make("h5", {}, "raises most"), make("h5", {}, "lowers most"), logits(b, at, 0, "up"), logits(b, at, meta.n_logits, "down"))));
    }
    if (meta.n_nearest) aside.append(make("div", {}, make("h4", {}, "nearest decoder directions (cosine)"), nearest(b, at)));
    article.append(make("div", { class: "dash" }, aside, text));
    return article;
  };

  // Which latents, in which order

  const PER_PAGE = 8;
  const state = { query: "", sort: "sample", up: false, seed: 0, page: 0 };
  const random = (seed) => () => {  // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const living = () => {
    const found = [];
    for (let i = 0; i < index.latent.length; i++) if (index.starts[i + 1] > index.starts[i]) found.push(i);
    return found;
  };
  const sample = () => {
    const order = living(), draw = random(state.seed);
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(draw() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  };
  const search = (query) => {
    const score = new Map();
    const numbers = query.split(/[\s,]+/).filter(Boolean);
    if (numbers.every((n) => /^#?\d+$/.test(n)))
      numbers.forEach((n, k) => { const i = place.get(Number(n.replace("#", ""))); if (i !== undefined) score.set(i, 1e9 - k); });
    const fold = query === query.toLowerCase() ? (t) => t.toLowerCase() : (t) => t;
    const weight = tokens.map((token) => {
      const text = fold(plain(token));
      return text.trim() === query.trim() ? 2 : text.includes(query) ? 1 : 0;
    });
    weight[0] = 0;
    for (let i = 0; i < index.latent.length; i++) {
      let sum = 0;
      for (let s = index.starts[i]; s < index.starts[i + 1]; s++) sum += weight[index.peak[s]];
      if (sum && !score.has(i)) score.set(i, sum);
    }
    return score;
  };
  const ordered = () => {
    let order;
    const score = state.query.trim() ? search(state.query) : null;
    if (score) order = [...score.keys()].sort((a, b) => score.get(b) - score.get(a) || index.latent[a] - index.latent[b]);
    else if (state.sort === "sample") return sample();
    else order = living();
    if (state.sort === "sample") return order;
    const key = state.sort === "latent" ? index.latent : index[`column ${state.sort}`];
    const way = state.up ? 1 : -1;
    return order.sort((a, b) => {
      const missing = Number.isNaN(key[a]) - Number.isNaN(key[b]);
      return missing || way * (key[a] - key[b]) || index.latent[a] - index.latent[b];
    });
  };

  // The controls

  const describe = (n) => {
    const all = n.toLocaleString("en");
    const number = Number(state.query.trim().replace("#", ""));
    if (state.query.trim() && !n && Number.isInteger(number) && number >= 0 && number < meta.d_sae)
      return `Latent ${number} is not among the ${index.latent.length.toLocaleString("en")} of ${meta.d_sae.toLocaleString("en")} that were drawn for this page; --latents asks for more.`;
    if (!n && !state.query.trim()) return `No latent fires on the ${meta.n_rows.toLocaleString("en")} rows; search for a number to see its weights.`;
    if (state.query.trim()) return n ? `${all} ${n === 1 ? "latent" : "latents"} with “${state.query.trim()}” as number or strongest token` : `No latent with “${state.query.trim()}” as number or strongest token.`;
    return state.sort === "sample" ? `${all} living latents in random order` : `${all} living latents by ${label(state.sort)}`;
  };
  let drawing = 0;
  const draw = async () => {
    const mine = ++drawing;
    const order = ordered();
    const pages = Math.max(1, Math.ceil(order.length / PER_PAGE));
    state.page = Math.max(0, Math.min(state.page, pages - 1));
    const cards = await Promise.all(order.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map(card));
    if (mine !== drawing) return;  // something else was asked for meanwhile
    $("cards").replaceChildren(...cards);
    $("found").textContent = describe(order.length);
    $("where").textContent = `page ${state.page + 1} of ${pages.toLocaleString("en")}`;
    $("before").disabled = state.page === 0;
    $("after").disabled = state.page === pages - 1;
    $("turn").disabled = state.sort === "sample";
    $("turn").textContent = state.up ? "smallest first" : "largest first";
    $("sort").options[0].textContent = state.query.trim() ? "best match" : "random sample";
    $("again").hidden = Boolean(state.query.trim()) || state.sort !== "sample";
  };
  const change = (values) => { Object.assign(state, { page: 0 }, values); return draw(); };
  const fromHash = () => {
    const found = /^#latent-(\d+)$/.exec(location.hash);
    if (!found) return false;
    $("q").value = found[1];
    state.query = found[1];
    state.sort = $("sort").value = "sample";
    return true;
  };
  const start = async () => {
    index = await block(0);
    ({ meta } = index);
    ({ tokens } = meta);
    index.latent.forEach((latent, i) => place.set(latent, i));
    state.seed = meta.seed;
    for (const name of ["density", "max_activation", "mean_activation", ...meta.columns.filter((c) => !["fires", "density", "max_activation", "mean_activation"].includes(c)), "latent"])
      if (name === "latent" || meta.columns.includes(name)) $("sort").append(make("option", { value: name }, label(name)));
    let wait = 0;
    $("q").addEventListener("input", () => {
      clearTimeout(wait);
      wait = setTimeout(() => change({ query: $("q").value }), 120);
    });
    $("tools").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(wait); change({ query: $("q").value }); });
    $("sort").addEventListener("change", () => change({ sort: $("sort").value, up: $("sort").value === "latent" }));
    $("turn").addEventListener("click", () => change({ up: !state.up }));
    $("again").addEventListener("click", () => change({ seed: state.seed + 1 }));
    const turnPage = async (step) => {
      state.page += step;
      await draw();
      $("latents").scrollIntoView();
    };
    $("before").addEventListener("click", () => turnPage(-1));
    $("after").addEventListener("click", () => turnPage(1));
    addEventListener("hashchange", async () => {
      if (fromHash()) { await change({}); $("latents").scrollIntoView(); }
    });
    const linked = fromHash();
    await draw();
    if (linked) $("latents").scrollIntoView();
    $("tools").hidden = false;
    ready();
  };
  if (typeof DecompressionStream === "undefined")
    $("found").textContent = "This browser cannot unpack the dashboards (it lacks DecompressionStream): Chrome 80, Firefox 113 and Safari 16.4 or newer can.";
  else start().catch((error) => { $("found").textContent = `The dashboards could not be read: ${error.message}`; throw error; });
})();
