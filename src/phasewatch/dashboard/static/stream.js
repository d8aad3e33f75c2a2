// The event stream of the hub: it reads the present state, follows it, reconnects and detects a lost connection.
// A browser allows six connections per host, so the tabs of one dashboard share one stream. The tab that holds the lock
// receives the stream and forwards it. Each tab reads the state once by a short request.
const LOST_MS = 6000; // three missed heartbeats
const LOCK = "phasewatch-stream";
const MOST_WAITING = 4000; // messages kept while the state is read
const RETRY_MS = 1500;
const EVENTS = ["seen", "phase", "alarm", "score", "confusion", "perf", "profile"];

export class Stream {
  // on: {state(), event(kind, event, at), read(), gap(words), link("live" | "lost", sinceMs, words)}
  constructor(on) {
    this.on = on;
    this.lastId = "";
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    this.skew = 0; // clock of the hub minus clock of the browser, ms
    this.role = "follower"; // gets messages forwarded; or "leader", which has the stream
    this.source = null;
    this.waiting = null; // messages that arrive while the state is read
    this.share();
    this.read();
    setInterval(() => this.check(), 1000);
  }

  share() {
    const lead = () => {
      this.role = "leader";
      if (this.waiting === null) this.open(); // else after the state has been read
      return new Promise(() => {}); // the lock is held until the tab is closed
    };
    if (!navigator.locks || !window.BroadcastChannel) { lead(); return; } // old browser: one stream per tab
    this.channel = new BroadcastChannel(LOCK);
    this.channel.onmessage = (m) => { if (this.role === "follower") this.take(m.data); };
    navigator.locks.request(LOCK, lead);
  }

  // Read the state of all machines, then follow the stream from there.
  async read() {
    this.waiting ??= []; // a second try keeps what arrived during the first
    let state;
    try {
      const answer = await fetch("/state.json", { cache: "no-store" });
      this.refused = answer.status === 401 ? "Access denied: open the address that the dashboard printed" : undefined;
      if (!answer.ok) throw new Error(String(answer.status));
      state = await answer.json();
    } catch {
      setTimeout(() => this.read(), RETRY_MS);
      return;
    }
    const waiting = this.waiting;
    this.waiting = null;
    this.skew = state.t_wall_ns / 1e6 - Date.now();
    this.lastId = state.id;
    this.heard();
    this.on.state();
    for (const alarm of state.alarms.reverse()) this.on.event("alarm", { alarm });
    for (const { kind, received_ms, event } of state.events) this.on.event(kind, event, received_ms - this.skew);
    for (const message of waiting) this.take(message);
    this.on.read();
    if (this.role === "leader" && this.source === null) this.open();
  }

  open() {
    const source = new EventSource("/events" + (this.lastId ? "?after=" + encodeURIComponent(this.lastId) : ""));
    this.source = source;
    for (const kind of ["hello", "beat", "gap", "dropped", ...EVENTS]) {
      source.addEventListener(kind, (m) => {
        const message = { kind, text: m.data, id: m.lastEventId };
        this.channel?.postMessage(message);
        this.take(message);
      });
    }
    source.onerror = () => { this.check(); };
  }

  heard() {
    this.heardAt = performance.now();
    this.heardWall = Date.now();
    this.on.link("live", this.heardWall, "live");
  }

  take(message) {
    if (this.waiting !== null) {
      this.waiting.push(message);
      if (this.waiting.length > MOST_WAITING) this.waiting.shift();
      this.heard();
      return;
    }
    const { kind, text, id } = message;
    const data = JSON.parse(text);
    this.heard();
    if (kind === "hello" || kind === "beat") this.skew = data.t_wall_ns / 1e6 - Date.now();
    if (kind === "gap" || kind === "dropped") this.gap(kind, data);
    else if (EVENTS.includes(kind) && this.isNews(id)) {
      this.lastId = id;
      const receivedMs = receivedOf(id);
      // A message that came late makes the hub's clock look slow, and old data young; later events correct that.
      this.skew = Math.max(this.skew, receivedMs - Date.now());
      // The age is that since the dashboard received the event, so a page that a busy machine delayed, or that was
      // opened later, shows the same. The clock of a producer may be wrong and is not used.
      this.on.event(kind, data, receivedMs - this.skew);
    }
  }

  gap(kind, data) {
    this.on.gap(kind === "dropped" ? `Gap: ${data.why}.` : data.missed === null
      ? `Gap: ${data.why}; earlier events may be missing on this page.` : `Gap: ${data.missed} ${data.why}.`);
    this.read();
  }

  // An event is in the state and on the stream, or arrives after a restart of the hub.
  isNews(id) { return bootOf(id) !== bootOf(this.lastId) || numberOf(id) > numberOf(this.lastId); }

  check() {
    const isCut = this.source !== null && this.source.readyState !== EventSource.OPEN;
    const silentMs = performance.now() - this.heardAt;
    if (silentMs > LOST_MS || (isCut && silentMs > 2500)) {
      this.on.link("lost", this.heardWall, this.refused ?? "No connection");
    }
    if (this.source === null) return; // the leader reconnects
    // A browser does not retry after a refusal, and a silent stream may hang: open a new one.
    if (this.source.readyState === EventSource.CLOSED || silentMs > 4 * LOST_MS) {
      this.source.close();
      this.heardAt = performance.now() - LOST_MS - 1;
      fetch("/about.json", { cache: "no-store" })
        .then((answer) => { this.refused = answer.status === 401 ? "Access denied: open the address that the dashboard printed" : undefined; })
        .catch(() => { this.refused = undefined; });
      this.open();
    }
  }
}

const bootOf = (id) => id.split(".")[0];
const numberOf = (id) => Number(id.split(".")[1]);
const receivedOf = (id) => Number(id.split(".")[2]);
