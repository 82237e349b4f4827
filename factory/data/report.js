// The map and the list of samples. Texts of samples only ever reach the page as text nodes.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const count = data.x.length;
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const plain = (code) => code.replaceAll("_", " ");
  const value = (column, i) => data[column].names[data[column].of[i]] ?? "";

  // Paul Tol's muted scheme and three of his vibrant one, told apart in the usual kinds of colour blindness; dark: the deep ones lifted.
  const LIGHT = ["#332288", "#CC6677", "#117733", "#DDAA33", "#44AA99", "#882255", "#66AADD", "#999933", "#AA4499", "#EE7733", "#5577AA", "#8A6F4E"];
  const DARK = ["#9C8FE8", "#E58A98", "#5DBB76", "#E8C45E", "#5FD0BD", "#D0699C", "#8CC8F0", "#BDBD55", "#D07CC2", "#F29A63", "#8FA8D6", "#C0A27C"];
  const FATES = ["accepted", "real", "holdout", "surplus", "pending", "rejected"];
  const MEANING = { accepted: "accepted", real: "real", holdout: "real, set aside for test", surplus: "good, but its place was full", pending: "not judged yet", rejected: "rejected" };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const fateColour = () => ({ accepted: theme("--kept"), real: theme("--real"), holdout: theme("--link"), surplus: theme("--dim"), pending: theme("--dim"), rejected: theme("--out") });

  // -- what is coloured ------------------------------------------------------------------------------------------------
  const ways = [["label", "Label"], ["cluster", "Cluster"], ["teacher", "Teacher"], ["fate", "Fate"], ["split", "Split"]].filter(([name]) => data[name].names.length > 0);
  const offered = ways.filter(([name]) => name === "fate" || data[name].names.length > 1);
  let way = offered[0][0];
  let single = null; // the category that is singled out, as an index; null: all
  let upto = Infinity; // the last round whose samples are shown
  const there = (i) => data.round[i] <= upto;
  const colourOf = (index) => {
    const palette = dark.matches ? DARK : LIGHT;
    if (way === "fate") return fateColour()[data.fate.names[index]];
    return index < 0 || index >= palette.length ? theme("--dim") : palette[index];
  };

  // -- the plane -------------------------------------------------------------------------------------------------------
  const canvas = byId("plane"), pen = canvas.getContext("2d"), tip = byId("tip");
  const view = { scale: 1, x: 0, y: 0 };
  let width = 0, height = 0, hovered = -1, pinned = -1;
  const PAD = 34;
  const place = (i) => [
    (PAD + data.x[i] * (width - 2 * PAD)) * view.scale + view.x,
    (PAD + (1 - data.y[i]) * (height - 2 * PAD)) * view.scale + view.y,
  ];
  const order = [...Array(count).keys()].sort((a, b) => FATES.indexOf(value("fate", b)) - FATES.indexOf(value("fate", a)));

  const shape = (fate, x, y, r) => {
    pen.beginPath();
    if (fate === "rejected") {
      pen.moveTo(x - r, y - r); pen.lineTo(x + r, y + r); pen.moveTo(x + r, y - r); pen.lineTo(x - r, y + r);
    } else if (fate === "real" || fate === "holdout") {
      const d = r * 1.45;
      pen.moveTo(x, y - d); pen.lineTo(x + d, y); pen.lineTo(x, y + d); pen.lineTo(x - d, y); pen.closePath();
    } else {
      pen.arc(x, y, r, 0, 2 * Math.PI);
    }
  };
  const dot = (i, r, alpha) => {
    const fate = value("fate", i), [x, y] = place(i);
    pen.globalAlpha = alpha;
    pen.fillStyle = pen.strokeStyle = colourOf(data[way].of[i]);
    pen.lineWidth = 1.4;
    shape(fate, x, y, fate === "rejected" ? r * 0.75 : r);
    if (fate === "accepted" || fate === "real") {
      pen.fill();
      pen.strokeStyle = fate === "real" ? theme("--ink") : theme("--card");
      pen.lineWidth = fate === "real" ? 1.2 : 0.8;
    }
    pen.stroke();
  };
  const draw = () => {
    const ratio = devicePixelRatio || 1;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const r = (count > 1500 ? 3 : count > 500 ? 3.8 : 4.6) * Math.min(1.6, Math.sqrt(view.scale));
    for (const i of order) {
      if (!there(i)) continue;
      const out = single !== null && data[way].of[i] !== single;
      dot(i, r, out ? 0.1 : value("fate", i) === "rejected" ? 0.55 : 0.92);
    }
    pen.globalAlpha = 1;
    if (way === "label" || way === "cluster") names();
    for (const i of [pinned, hovered]) {
      if (i < 0 || !there(i)) continue;
      const [x, y] = place(i);
      pen.globalAlpha = 1; pen.strokeStyle = theme("--ink"); pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, r + 5, 0, 2 * Math.PI); pen.stroke();
    }
  };
  // Where the name of each category goes: above the crowd around the member that has the most of its own kind near it.
  const anchors = {};
  const anchor = (name) => {
    if (anchors[name]) return anchors[name];
    const members = data[name].names.map(() => []);
    data[name].of.forEach((category, i) => { if (category >= 0 && value("fate", i) !== "rejected") members[category].push(i); });
    return (anchors[name] = members.map((of) => {
      let crowd = [];
      for (const i of of.slice(0, 400)) {
        const near = of.filter((j) => Math.hypot(data.x[i] - data.x[j], data.y[i] - data.y[j]) < 0.08);
        if (near.length > crowd.length) crowd = near;
      }
      return crowd;
    }));
  };
  const names = () => {
    const taken = [];
    pen.font = "600 12px " + getComputedStyle(document.body).fontFamily;
    pen.textAlign = "center"; pen.textBaseline = "middle"; pen.lineJoin = "round";
    anchor(way).forEach((crowd, category) => {
      if (!crowd.length || category >= LIGHT.length || (single !== null && single !== category)) return;
      if (data[way].names[category] === "unclustered" || !crowd.some(there)) return;
      const lines = wrap(plain(data[way].names[category]));
      const half = Math.max(...lines.map((line) => pen.measureText(line).width)) / 2 + 4, tall = lines.length * 15;
      const spots = crowd.map(place), top = Math.min(...spots.map((spot) => spot[1])), bottom = Math.max(...spots.map((spot) => spot[1]));
      const middle = spots.reduce((sum, spot) => sum + spot[0], 0) / spots.length;
      if (middle < 0 || middle > width || bottom < 0 || top > height) return;
      const x = Math.min(Math.max(middle, half), width - half);
      const free = [top - tall - 8, bottom + 8, top - tall - 26, bottom + 26, (top + bottom - tall) / 2].map((y) => [x - half, y, x + half, y + tall])
        .find((box) => box[1] > 0 && box[3] < height && !taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]));
      if (!free) return;
      taken.push(free);
      lines.forEach((line, n) => {
        const at = free[1] + 15 * n + 7.5;
        pen.globalAlpha = 0.85; pen.lineWidth = 4; pen.strokeStyle = theme("--card"); pen.strokeText(line, x, at);
        pen.globalAlpha = 1; pen.fillStyle = theme("--ink"); pen.fillText(line, x, at);
      });
    });
  };
  const wrap = (text) => {
    const lines = [];
    for (const word of text.split(" ")) {
      const last = lines[lines.length - 1];
      if (last !== undefined && (last + " " + word).length <= 20) lines[lines.length - 1] = last + " " + word;
      else lines.push(word.length > 26 ? word.slice(0, 25) + "…" : word);
    }
    return lines.length > 3 ? [...lines.slice(0, 2), lines[2] + " …"] : lines;
  };

  const describe = (i, into) => {
    into.replaceChildren(make("div", data.text[i]));
    if (data.answer[i]) into.append(make("div", "→ " + data.answer[i], "meta"));
    const why = value("by", i) ? `${value("by", i)}: ${plain(value("reason", i) || "no reason")}${data.score[i] === null ? "" : ` (${data.score[i]})`}` : "";
    const facts = [MEANING[value("fate", i)], plain(value("label", i)), value("cluster", i), value("teacher", i), data.axes[i], value("split", i), why];
    into.append(make("div", facts.filter(Boolean).join(" · "), "meta"));
  };
  const nearest = (x, y) => {
    let best = -1, least = 14 * 14;
    for (let i = 0; i < count; i++) {
      if (!there(i) || (single !== null && data[way].of[i] !== single)) continue;
      const [px, py] = place(i), far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) [least, best] = [far, i];
    }
    return best;
  };
  const hover = (i) => {
    if (i !== hovered) { hovered = i; draw(); }
    tip.hidden = i < 0;
    if (i < 0) return;
    describe(i, tip);
    const [x, y] = place(i);
    tip.style.left = Math.max(6, Math.min(x + 14, width - tip.offsetWidth - 6)) + "px";
    tip.style.top = (y + 16 + tip.offsetHeight < height ? y + 16 : Math.max(6, y - tip.offsetHeight - 14)) + "px";
  };
  const zoom = (factor, x = width / 2, y = height / 2) => {
    const scale = Math.min(24, Math.max(1, view.scale * factor)), by = scale / view.scale;
    view.x = x - (x - view.x) * by; view.y = y - (y - view.y) * by; view.scale = scale;
    hold(); hover(-1); draw();
  };
  const hold = () => {
    view.x = Math.min(0, Math.max(width * (1 - view.scale), view.x));
    view.y = Math.min(0, Math.max(height * (1 - view.scale), view.y));
  };
  let grip = null;
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", (event) => { grip = { from: at(event), x: view.x, y: view.y, moved: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (!grip) return hover(nearest(x, y));
    const [dx, dy] = [x - grip.from[0], y - grip.from[1]];
    grip.moved ||= Math.hypot(dx, dy) > 4;
    if (grip.moved) { view.x = grip.x + dx; view.y = grip.y + dy; hold(); hover(-1); draw(); }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (grip && !grip.moved) {
      pinned = nearest(...at(event));
      byId("pinned").hidden = pinned < 0;
      if (pinned >= 0) describe(pinned, byId("pinned"));
      draw();
    }
    grip = null;
  });
  canvas.addEventListener("pointercancel", () => { grip = null; });
  canvas.addEventListener("pointerleave", () => { if (!grip) hover(-1); });
  canvas.addEventListener("dblclick", (event) => zoom(2, ...at(event)));
  canvas.addEventListener("wheel", (event) => { // without a key the page scrolls on
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), ...at(event));
  }, { passive: false });
  byId("closer").addEventListener("click", () => zoom(1.6));
  byId("farther").addEventListener("click", () => zoom(1 / 1.6));
  byId("whole").addEventListener("click", () => zoom(0));

  // -- legend and switch -----------------------------------------------------------------------------------------------
  const legend = () => {
    const sizes = new Map();
    data[way].of.forEach((category, i) => { if (there(i)) sizes.set(category, (sizes.get(category) ?? 0) + 1); });
    byId("legend").replaceChildren(...[...sizes.keys()].sort((a, b) => (a < 0) - (b < 0) || a - b).map((category) => {
      const name = category < 0 ? "none" : data[way].names[category];
      const button = make("button"), swatch = make("i");
      button.type = "button";
      swatch.style.background = colourOf(category);
      button.append(swatch, make("span", way === "fate" ? MEANING[name] : way === "label" ? plain(name) : name), make("span", String(sizes.get(category)), "n"));
      button.setAttribute("aria-pressed", String(single === category));
      button.addEventListener("click", () => { single = single === category ? null : category; hover(-1); legend(); draw(); });
      return button;
    }));
  };
  byId("colour").append(...offered.map(([name, title]) => {
    const button = make("button", title);
    button.type = "button";
    button.setAttribute("aria-pressed", String(name === way));
    button.addEventListener("click", () => {
      way = name; single = null;
      for (const other of byId("colour").children) other.setAttribute("aria-pressed", String(other === button));
      legend(); draw();
    });
    return button;
  }));

  const rounds = [...new Set(data.round)].filter((round) => round > 0).sort((a, b) => a - b);
  byId("upto").hidden = rounds.length < 2;
  byId("upto").append(...[...rounds, Infinity].map((round, n) => {
    const button = make("button", round === Infinity ? "all" : n ? String(round) : `round ${round}`);
    button.type = "button";
    button.title = round === Infinity ? "All rounds" : `Samples up to round ${round}, with the fates that they had in the end`;
    button.setAttribute("aria-pressed", String(round === upto));
    button.addEventListener("click", () => {
      upto = round;
      for (const other of byId("upto").children) other.setAttribute("aria-pressed", String(other === button));
      hover(-1); legend(); draw();
    });
    return button;
  }));

  // -- the list --------------------------------------------------------------------------------------------------------
  const rank = data.fate.of.map((fate) => ["accepted", "surplus", "pending", "rejected", "real", "holdout"].indexOf(data.fate.names[fate]));
  const listed = [...Array(count).keys()].sort((a, b) => rank[a] - rank[b] || a - b);
  const PAGE = 25;
  let shown = PAGE;
  const fill = (select, title, column, words = plain) => {
    select.append(new Option(title, ""), ...[...data[column].names].sort().map((name) => new Option(words(name), name)));
    select.hidden = data[column].names.length < 2;
    select.addEventListener("change", () => { shown = PAGE; list(); });
  };
  fill(byId("by-fate"), "every fate", "fate");
  fill(byId("by-label"), "every label", "label");
  byId("query").addEventListener("input", () => { shown = PAGE; list(); });
  byId("more").addEventListener("click", () => { shown += 4 * PAGE; list(); });
  const lower = data.text.map((text, i) => (text + "\n" + data.answer[i]).toLowerCase());
  const list = () => {
    const words = byId("query").value.toLowerCase().split(/\s+/).filter(Boolean), fate = byId("by-fate").value, label = byId("by-label").value;
    const found = [];
    for (const i of listed) {
      if ((!fate || value("fate", i) === fate) && (!label || value("label", i) === label) && words.every((word) => lower[i].includes(word))) found.push(i);
    }
    const colours = fateColour();
    byId("rows").replaceChildren(...found.slice(0, shown).map((i) => {
      const row = make("tr"), fateCell = make("td", undefined, "fate"), mark = make("i"), text = make("td", data.text[i]);
      mark.style.background = colours[value("fate", i)];
      fateCell.append(mark, value("fate", i));
      if (data.answer[i]) text.append(make("div", "→ " + data.answer[i], "dim"));
      const why = value("by", i) ? `${plain(value("reason", i) || "")}${data.score[i] === null ? "" : ` ${data.score[i]}`}` : "";
      row.append(fateCell, text, make("td", plain(value("label", i)), "dim"), make("td", value("teacher", i), "dim"), make("td", why, "dim"));
      return row;
    }));
    byId("found").textContent = found.length === count ? "" : `${found.length} found`;
    byId("more").hidden = found.length <= shown;
  };

  const fit = () => {
    const box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    [width, height] = [box.width, box.height];
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    hold(); draw();
  };
  new ResizeObserver(fit).observe(canvas);
  dark.addEventListener("change", () => { legend(); list(); draw(); });
  legend(); list(); fit();
})();
