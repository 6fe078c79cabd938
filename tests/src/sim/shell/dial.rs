//! Agents that are dialled, and the host's own that is put into a guest first: what Incus and the guest make of it.

use pika_cloud_common::wire::Transport;
use pika_host_collector::machine::SessionLoss;
use pika_host_collector::runtime::{Agent, Way};

use super::Checked;
use crate::sim::host::Dialing;
use crate::sim::incus::{Status, vsock_of};
use crate::sim::link::Link;
use crate::sim::world::{Event, Stream, World};

impl World {
    /// Whoever is to be dialled is so after a while, and where the host's agent is to be put in first, that takes its time.
    pub(super) fn dial(&mut self, serial: u64, runtime: usize, id: u64, instance: &str, way: Way) {
        let number = self.incus.instance(instance).and_then(|found| vsock_of(&found.config));
        if let Some(driven) = self.host.driven(runtime) {
            driven.dialing = Some(Dialing { id, way, number });
        }
        let mut begins = self.now;
        if way.agent == Agent::Put {
            begins += self.random.millis(20, 900);
            self.at(begins, Event::Placed(serial, runtime, id));
        }
        let takes = self.random.millis(5, 60);
        self.at(begins + takes, Event::Dialled(serial, runtime, id));
    }

    pub(in crate::sim) fn dialled(&mut self, serial: u64, runtime: usize, id: u64) -> Checked {
        let (now, reading) = (self.now, self.host.clock.read(self.now));
        let dialing = self.of(serial, runtime).and_then(|driven| driven.dialing.take_if(|dialing| dialing.id == id));
        let Some(Dialing { way: dialled_by, number, .. }) = dialing else { return Ok(()) };
        let (transport, agent) = (dialled_by.transport, dialled_by.agent);
        let trouble = if self.quiet { 0 } else { self.plan.trouble.dial };
        let fails = self.random.chance(trouble) || now < self.incus.down_until;
        let closed = transport == Transport::Vsock && self.random.chance(self.plan.runtimes[runtime].no_vsock);
        let name = match (transport, &number) {
            // The number that was read a moment ago; whoever has it now is at the other end.
            (Transport::Vsock, Some(number)) => self.incus.machine_at(number.cid).map(str::to_owned),
            (Transport::Vsock, None) => None,
            (Transport::Exec, _) => Some(self.inhabitants[runtime].name.clone()),
        };
        let guest = self.inhabitants.iter().position(|inhabitant| Some(&inhabitant.name) == name.as_ref());
        let mut guest = guest.unwrap_or(runtime);
        let may_move = transport == Transport::Vsock && !self.quiet;
        if may_move && self.random.chance(self.plan.moved) {
            let others = (0..self.inhabitants.len()).filter(|other| *other != runtime);
            let mut machines = others.filter(|other| self.inhabitants[*other].guest.machine.uuid.is_some());
            let stranger = machines.next_back();
            match stranger.filter(|_| self.random.chance(500)) {
                Some(stranger) => guest = stranger,
                None => self.incus.renumber(&self.inhabitants[runtime].name),
            }
        }
        let inhabitant = &self.inhabitants[guest];
        let status = name.and_then(|name| self.incus.instance(&name)).map(|found| found.status);
        let dialled = if closed {
            Err(SessionLoss::NoTransport("there is no vsock here".to_owned()))
        } else if fails || status != Some(Status::Running) {
            Err(SessionLoss::Lost("nobody is there".to_owned()))
        } else if agent != Agent::Image && self.plan.runtimes[runtime].no_own {
            Err(SessionLoss::NoAgent("the host has none".to_owned()))
        } else if !inhabitant.guest.up || inhabitant.guest.is_frozen(now) {
            Err(SessionLoss::Lost("the agent does not answer".to_owned()))
        } else if agent == Agent::Put && !inhabitant.has_own {
            self.oracle.facts(runtime).agentless = true;
            Err(SessionLoss::NotPut("the disk is full".to_owned()))
        } else if transport == Transport::Vsock && !inhabitant.has_agent {
            Err(SessionLoss::Lost("nobody listens".to_owned()))
        } else if !(if agent == Agent::Image { inhabitant.has_agent } else { inhabitant.has_own }) {
            return self.dialled_nobody(serial, runtime, id);
        } else {
            Ok(number.filter(|_| transport == Transport::Vsock))
        };
        if dialled.is_ok() {
            self.connect(serial, runtime, guest, agent);
        }
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.dialled(id, dialled, reading);
        self.perform(runtime)
    }

    /// There is a stream, and a program at its other end that ends at once: there is no such agent.
    fn dialled_nobody(&mut self, serial: u64, runtime: usize, id: u64) -> Checked {
        let reading = self.host.clock.read(self.now);
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.dialled(id, Ok(None), reading);
        self.perform(runtime)?;
        let Some(driven) = self.of(serial, runtime) else { return Ok(()) };
        driven.core.link_lost(SessionLoss::NoAgent("exec ended with 127".to_owned()), reading);
        self.perform(runtime)
    }

    /// All of the host's agent has come, where the collector lives that sends it and the guest takes it.
    pub(in crate::sim) fn placed(&mut self, serial: u64, runtime: usize, id: u64) {
        let now = self.now;
        let is_sent =
            self.of(serial, runtime).is_some_and(|driven| driven.dialing.as_ref().is_some_and(|d| d.id == id));
        let plan = &self.plan.runtimes[runtime];
        let (bad, no_own) = (if self.quiet { 0 } else { plan.bad_puts }, plan.no_own);
        let is_refused = self.random.chance(bad);
        let inhabitant = &mut self.inhabitants[runtime];
        if is_sent && !no_own && !is_refused && inhabitant.guest.up && !inhabitant.guest.is_frozen(now) {
            inhabitant.has_own = true;
            self.say(&format_args!("g{runtime}"), format_args!("has the host's agent"));
        }
    }

    fn connect(&mut self, serial: u64, runtime: usize, guest: usize, agent: Agent) {
        self.sessions += 1;
        let (session, now, manner) = (self.sessions, self.now, self.manner(guest, agent));
        self.oracle.connected(runtime, manner);
        if guest != runtime {
            self.say(&format_args!("r{runtime}"), format_args!("its number leads to g{guest}"));
        }
        let link = Link::new(self.plan.nature, self.random.fork());
        self.streams.push(Stream { link, runtime, guest, session, serial });
        let stream = self.streams.len() - 1;
        self.inhabitants[guest].guest.accept(session, manner, now);
        if let Some(driven) = self.of(serial, runtime) {
            driven.link = Some(stream);
        }
        self.after_guest(guest);
    }
}
