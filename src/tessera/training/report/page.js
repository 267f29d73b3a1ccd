/* Puts the page together: choices, colours of arms, light and dark, printing, the copy button, the sections' links. */
function choice(id, options, chosen, changed) {
  const field = byId(id);
  if (!field) return;
  field.hidden = options.length < 2;
  const buttons = options.map(([value, text]) => {
    const input = element("input", { type: "radio", name: id, checked: value === chosen });
    input.onchange = () => changed(value);
    return element("label", {}, input, text);
  });
  field.append(element("span", {}, ...buttons));
}

function colourArms() {
  for (const marked of document.querySelectorAll("[data-arm]")) {
    const arm = report.arms.find(({ name }) => name === marked.dataset.arm);
    if (arm) marked.style.setProperty("--arm", `var(--${armColour(arm)})`);
  }
}

function drawAll() {
  drawLoss();
  drawDifference();
  drawBits();
  drawProgress();
  drawAcceptance();
  drawExperts();
  drawTensors();
}

function copyRecipe() {
  const button = byId("copy"), text = byId("recipe-text");
  if (!button) return;
  button.onclick = async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch { // not every browser lets a local file do that
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
}

function markSection() {
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      for (const [id, link] of links) {
        if (id === target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-20% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main > section")) seen.observe(section);
}

function printing() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    root.classList.add("printing");
    drawAll();
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    root.classList.remove("printing");
    drawAll();
  });
}

choice("smoothing", SMOOTHING.map((steps) => [steps, steps ? `${steps} steps` : "none"]), smoothing, (value) => { smoothing = value; drawLoss(); });
choice("expert-arm", loaded.map((arm) => [arm, arm.label]), loadArm, (arm) => { loadArm = arm; drawExperts(); });
choice("health-arm", measured.map((arm) => [arm, arm.label]), healthArm, (arm) => { healthArm = arm; drawTensors(); });
colourArms();
prepareTensors();
copyRecipe();
markSection();
printing();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
root.dataset.drawn = "yes";
