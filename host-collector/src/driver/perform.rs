//! Carrying out what the machine decided, and bringing back what came of it.

use pika_cloud_common::limits::PEER_TIMEOUT;
use pika_cloud_common::request::REQUEST_SCHEMA_VERSION;
use pika_cloud_common::wire::{Empty, HostMessage, Signal, Start as StartMessage};
use pika_cloud_common::{GuestRequest, State};

use super::{Driver, Op};
use crate::error::Error;
use crate::incus::{Client, InstanceState, InstanceView, Labels, create_request};
use crate::journal::HostRecord;
use crate::machine::{Action, CallFailure, EndDecision, Found, Input, SessionLoss};
use crate::transport::dial_exec;

/// How long a dial may take: Incus answers an exec and its websockets in milliseconds, or not at all.
const DIAL_TIMEOUT: std::time::Duration = PEER_TIMEOUT;

impl Driver {
    /// Performs actions, and those that they lead to.
    pub(super) async fn perform(&mut self, actions: Vec<Action>) -> Result<(), Error> {
        for action in actions {
            // An action may step the machine again; the box breaks the cycle of their futures.
            Box::pin(self.perform_one(action)).await?;
        }
        Ok(())
    }

    async fn perform_one(&mut self, action: Action) -> Result<(), Error> {
        match action {
            Action::Record(state, message) => self.journal.host(HostRecord::State { state, message }),
            Action::Look => self.look(),
            Action::Create => self.create().await?,
            Action::Start => self.start(),
            Action::Dial => self.dial(),
            Action::HangUp => self.hang_up(),
            Action::StartWorkload => self.start_workload().await?,
            Action::Terminate => {
                // A start that still waits for the disk is not sent any more.
                self.next_commit.send.clear();
                self.in_commit.send.clear();
                self.send(&HostMessage::Signal(Signal { name: "TERM".to_owned() })).await?;
            }
            Action::End(end) => self.end(end),
            Action::Collect => self.collect().await?,
            Action::Conclude => self.conclude().await?,
            Action::Destroy => self.destroy().await?,
            Action::Keep => self.keep().await?,
        }
        Ok(())
    }

    fn target(&self) -> (Client, String, String) {
        (self.client.clone(), self.spec.incus.project.clone(), self.spec.identity.instance_name.clone())
    }

    pub(super) fn look(&mut self) {
        let (client, project, name) = self.target();
        self.ops.spawn(async move {
            let answer = client.instance(&project, &name).await;
            Op::Looked(answer.map_err(|error| failure(&error)))
        });
    }

    async fn create(&mut self) -> Result<(), Error> {
        // What Incus is asked for must be on the disk before.
        self.journal.commit().await?;
        let (client, project, _) = self.target();
        let (spec, owner) = (self.spec.clone(), self.owner.clone());
        self.provisioning = true;
        self.ops.spawn(async move {
            let answer = async {
                let profile = client.profile(&project, &spec.incus.profile).await?;
                let root_disk = profile.as_ref().and_then(|profile| profile.root_disk());
                client.create_instance(&project, &create_request(&spec, &owner, root_disk)).await
            };
            Op::Provisioned(Input::Created(answer.await.map_err(|error| failure(&error))))
        });
        Ok(())
    }

    fn start(&mut self) {
        let (client, project, name) = self.target();
        self.provisioning = true;
        self.ops.spawn(async move {
            let answer = client.start_instance(&project, &name).await;
            Op::Provisioned(Input::Started(answer.map_err(|error| failure(&error))))
        });
    }

    pub(super) fn dial(&mut self) {
        let (client, project, name) = self.target();
        self.ops.spawn(async move {
            let dial = tokio::time::timeout(DIAL_TIMEOUT, dial_exec(&client, &project, &name));
            Op::Dialled(match dial.await {
                Ok(Ok(link)) => Ok(Box::new(link)),
                Ok(Err(error)) => Err(SessionLoss::Lost(error.to_string())),
                Err(_) => Err(SessionLoss::Lost("Incus did not open a session in time".to_owned())),
            })
        });
    }

    pub(super) fn hang_up(&mut self) {
        if let Some(live) = self.live.take() {
            tokio::spawn(live.hang_up());
        }
    }

    pub(super) fn request_id(&self) -> String {
        format!("{}.{}", self.spec.identity.runtime_id, self.journal.view().incarnation)
    }

    /// The guest is asked only after the journal says so: a collector that dies in between asks again, and the guest, which
    /// knows the id, starts nothing (Invariant 9).
    async fn start_workload(&mut self) -> Result<(), Error> {
        let spec = &self.spec;
        let message = HostMessage::Start(StartMessage {
            request_id: self.request_id(),
            request: GuestRequest {
                schema_version: REQUEST_SCHEMA_VERSION,
                command: spec.entry_command.clone().unwrap_or_default(),
                timeout_secs: spec.watchdogs.run_secs.unwrap_or(0),
                run_as_root: spec.bootstrap.run_as_root,
                extra: serde_json::Map::default(),
            },
            env: spec.bootstrap.env.clone(),
            cwd: spec.bootstrap.cwd.clone(),
            stop_grace_secs: spec.watchdogs.stop_grace_secs,
        });
        if self.journal.view().start_sent.is_some() {
            return self.send(&message).await;
        }
        self.journal.host(HostRecord::StartSent { request_id: self.request_id() });
        self.next_commit.send.push(message);
        Ok(())
    }

    fn end(&mut self, end: EndDecision) {
        let EndDecision { outcome, message, error } = end;
        let instance_status = self.instance_status.clone();
        self.journal.host(HostRecord::Ended { outcome, message, error, instance_status });
    }

    async fn conclude(&mut self) -> Result<(), Error> {
        if self.journal.view().verdict.is_none() {
            let verdict = crate::outputs::verdict(&self.spec, self.journal.view());
            self.journal.host(HostRecord::Verdict { verdict: Box::new(verdict) });
        }
        self.commit_all().await?;
        let outputs = self.folder.incarnation(self.journal.view().incarnation);
        crate::outputs::derive(self.folder.path(), &outputs, self.journal.view().incarnation)?;
        self.step(Input::Concluded).await
    }

    /// Makes everything durable, logs included, and lets the guest know.
    async fn commit_all(&mut self) -> Result<(), Error> {
        while self.journal.is_committing() || self.journal.pending() > 0 || self.logs.is_dirty() {
            if !self.journal.is_committing() {
                self.start_commit(true)?;
            }
            self.journal.committed().await?;
            self.committed().await?;
        }
        Ok(())
    }

    async fn release(&mut self) -> Result<(), Error> {
        self.send(&HostMessage::Release(Empty {})).await?;
        if let Some(live) = self.live.take() {
            live.hang_up().await;
        }
        Ok(())
    }

    async fn keep(&mut self) -> Result<(), Error> {
        self.release().await?;
        self.folder.clear_cancel();
        self.journal.host(HostRecord::Finished { destroyed: false });
        self.commit_all().await
    }

    async fn destroy(&mut self) -> Result<(), Error> {
        self.release().await?;
        // A create that is still under way would make the instance again behind our back.
        while self.provisioning {
            match self.ops.join_next().await {
                Some(Ok(Op::Provisioned(_))) | None => self.provisioning = false,
                Some(_) => {}
            }
        }
        let (client, project, name) = self.target();
        let (runtime_id, owner) = (self.spec.identity.runtime_id.clone(), self.owner.clone());
        self.ops.spawn(async move {
            Op::Destroyed(crate::destroy::destroy(&client, &project, &name, &runtime_id, &owner).await)
        });
        Ok(())
    }

    /// Takes the answer of a call.
    pub(super) async fn op(&mut self, op: Op) -> Result<(), Error> {
        match op {
            Op::Looked(answer) => self.looked(answer).await,
            Op::Provisioned(input) => {
                self.provisioning = false;
                self.step(input).await
            }
            Op::Dialled(Ok(link)) => self.open_session(*link).await,
            Op::Dialled(Err(loss)) | Op::Lost(loss) => self.session_lost(loss).await,
            Op::Destroyed(answer) => {
                match &answer {
                    Ok(()) => {
                        self.left_behind = None;
                        self.folder.clear_cancel();
                        self.journal.host(HostRecord::State {
                            state: State::Destroyed,
                            message: "the instance is deleted".to_owned(),
                        });
                        self.journal.host(HostRecord::Finished { destroyed: true });
                        self.commit_all().await?;
                    }
                    Err(failure) => self.left_behind = Some(failure.message.clone()),
                }
                self.step(Input::Destroyed(answer)).await
            }
        }
    }

    async fn looked(&mut self, answer: Result<Option<InstanceView>, CallFailure>) -> Result<(), Error> {
        if let Ok(found) = &answer {
            self.instance_status = Some(found.as_ref().map_or("absent", |view| view.status.as_str()).to_owned());
        }
        if self.collecting.is_some() {
            return self.collecting_looked(answer).await;
        }
        let found = match answer {
            Ok(Some(view)) if !self.is_ours(&view) => Err(CallFailure {
                transient: false,
                message: format!("instance `{}` is not of this runtime any more", view.name),
            }),
            answer => answer.map(|view| found(view.as_ref())),
        };
        self.step(Input::Looked(found)).await
    }

    fn is_ours(&self, view: &InstanceView) -> bool {
        Labels::read(&view.config)
            .is_some_and(|labels| labels.runtime_id == self.spec.identity.runtime_id && labels.owner == self.owner)
    }
}

pub(super) fn found(view: Option<&InstanceView>) -> Found {
    match view {
        None => Found::Absent,
        Some(view) => match view.state() {
            InstanceState::Running => Found::Running,
            InstanceState::Stopped => Found::Stopped,
            InstanceState::Changing => Found::Changing(view.status.clone()),
            InstanceState::Error => Found::Error,
        },
    }
}

pub(crate) fn failure(error: &crate::incus::Error) -> CallFailure {
    CallFailure { transient: error.is_transient(), message: error.to_string() }
}
