//! `bake`: what is done, what the provisioning script prints, and what came of it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pika_cloud_common::verdict::EXIT_CANCELLED;
use pika_host_collector::Cloud;
use pika_host_collector::bake::{Bake, BakeProgress, Baked};
use serde_json::json;
use tokio::sync::watch;

use crate::args;
use crate::exit::{Failure, of_failure};
use crate::print;
use crate::run::{Wish, Wishes};

/// `pika-cloud bake`.
pub(crate) async fn bake(cloud: &Cloud, args: &args::Bake, json: bool) -> Result<ExitCode, Failure> {
    let order = Bake {
        project: args.project.clone(),
        profiles: args.profile.clone(),
        files: args.file.clone(),
        provision: args.provision.clone(),
        provision_limit: Duration::from_secs(args.timeout),
        ..Bake::new(&args.from, &args.to)
    };
    let began = Instant::now();
    let is_baked = AtomicBool::new(false);
    let mut tell = |progress: BakeProgress<'_>| match progress {
        BakeProgress::Baked(_) => is_baked.store(true, Ordering::Relaxed),
        BakeProgress::Step(what) => print::phase(began.elapsed(), "baking", what),
        // Standard output is the document's.
        BakeProgress::Output(bytes) if json => print::log_beside(bytes),
        BakeProgress::Output(bytes) => print::log(bytes),
        _ => {}
    };
    let (cancel, wish) = watch::channel(false);
    let mut wishes = Wishes::new()?;
    let mut baking = std::pin::pin!(cloud.bake(&order, &mut tell, wish));
    let baked = loop {
        tokio::select! {
            baked = &mut baking => break baked,
            wish = wishes.next() => match wish {
                Wish::Cancel | Wish::Detach if is_baked.load(Ordering::Relaxed) => {
                    print::note("it is baked, and what it replaces is being removed; once more to leave that to `pika-cloud reconcile`");
                }
                Wish::Now if is_baked.load(Ordering::Relaxed) => {
                    print::note("it is baked: `pika-cloud reconcile` removes what it replaced");
                    return Ok(ExitCode::SUCCESS);
                }
                Wish::Cancel | Wish::Detach => {
                    print::note("interrupted: removing what was made for the image; once more to leave at once");
                    // `bake` holds the other end.
                    let _ = cancel.send(true);
                }
                Wish::Now => {
                    print::note("left as it is: `pika-cloud reconcile` removes what was made for the image");
                    return Ok(ExitCode::from(EXIT_CANCELLED));
                }
            },
        }
    };
    match baked {
        Ok(baked) => {
            show(args, &baked, json, began.elapsed());
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if error.is_interrupted() => {
            print::error(&error.to_string());
            Ok(ExitCode::from(EXIT_CANCELLED))
        }
        Err(error) => Ok(of_failure(&Failure::Bake(Box::new(error)))),
    }
}

fn show(args: &args::Bake, baked: &Baked, json: bool, took: Duration) {
    let Baked { fingerprint, base_fingerprint, agent_version, agent_digest, .. } = baked;
    for fingerprint in &baked.deleted {
        print::phase(took, "baking", &format!("deleted the image that {} had before, {fingerprint}", args.to));
    }
    if let Some(foreign) = &baked.foreign {
        let whose = "it was not baked from this state dir, and stays";
        print::phase(took, "baking", &format!("the image that {} had before is {foreign}: {whose}", args.to));
    }
    for kept in &baked.kept {
        print::phase(took, "baking", &format!("kept {kept}; `pika-cloud reconcile` looks again"));
    }
    if let Some(left) = &baked.left {
        print::note(&format!("not all could be removed ({left}): `pika-cloud reconcile`, or the next bake, does that"));
    }
    if json {
        let document = json!({
            "alias": args.to, "fingerprint": fingerprint, "bake": baked.bake, "init": baked.init.name(),
            "base_alias": args.from, "base_fingerprint": base_fingerprint,
            "agent_version": agent_version, "agent_digest": agent_digest,
            "deleted": baked.deleted, "foreign": baked.foreign, "kept": baked.kept, "left": baked.left,
        });
        print::line(&document.to_string());
    }
    let done = format!("{} is {fingerprint}, with pika-guest {agent_version}", args.to);
    print::phase(took, "completed", &done);
}
