-- bind: give each claimed request a decode instance with its KV reserved there, or tell that none has room.
--   KEYS     instance:<prefill>, queue, decode-load, counters
--   ARGV[2]  id of the prefill instance      [3] ms that the record of a request that ends here is kept
--   ARGV[4...] queue, its entry, request id, epoch; again for each claimed request, oldest first
--   returns  one {request id, verdict, decode instance, front end} a request. Verdicts: "BOUND"; "WAIT": claim kept, bind it again
--            later (so are all that follow it: none overtakes); "STALE": no longer this claim's, forget it
-- A mixed instance keeps what it claims as long as it has room.

local RETAIN, me = tonumber(ARGV[3]), ARGV[2]
local role = redis.call('HGET', KEYS[1], 'role')
if not role then return redis.error_reply('FENCED the lease of ' .. me .. ' has lapsed') end
local now = now_ms()

-- tokens to reserve on an instance when it has room, nil when not; second: whether it could never hold the input
local function fits(instance, wanted, input)
  local v = redis.call('HMGET', P .. 'instance:' .. instance, 'capacity_tokens', 'reserved_tokens', 'block_size',
                       'reserved_requests', 'capacity_requests')
  if not v[1] then return nil, true end
  local capacity, block = tonumber(v[1]), tonumber(v[3])
  if input + 1 > capacity then return nil, true end
  local tokens = math.min(math.ceil(wanted / block) * block, capacity)
  if tonumber(v[2]) + tokens > capacity or tonumber(v[4]) >= tonumber(v[5]) then return nil, false end
  return tokens, false
end

local function pick(wanted, input)
  if role == 'mixed' and redis.call('ZSCORE', KEYS[3], me) then
    local tokens = fits(me, wanted, input)
    if tokens then return me, tokens, false end
  end
  local offset, never, seen = 0, true, false
  while true do
    local page = redis.call('ZRANGE', KEYS[3], offset, offset + 15)
    for _, candidate in ipairs(page) do
      if redis.call('EXISTS', P .. 'instance:' .. candidate) == 1 then
        seen = true
        local tokens, too_small = fits(candidate, wanted, input)
        if tokens then return candidate, tokens, false end
        never = never and too_small
      else
        redis.call('ZREM', KEYS[3], candidate)
        offset = offset - 1
      end
    end
    if #page < 16 then break end
    offset = offset + 16
  end
  return nil, nil, seen and never
end

local result, full = {}, false
for i = 4, #ARGV, 4 do
  local queue, entry, id, epoch = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local r = load(id)
  if r and r.state == 'prefill' and r.prefill == me and r.epoch == epoch and r.queue_entry == entry
     and r.queue == queue then
    -- The reply to an earlier call was lost on its way.
    result[#result + 1] = {id, 'BOUND', r.decode, r.frontend}
  elseif not r or r.state ~= 'queued' or r.epoch ~= epoch or r.queue_entry ~= entry or r.queue ~= queue then
    remove_entry({queue = queue, queue_entry = entry})
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif tonumber(r.deadline_ms) <= now then
    terminate(id, r, 'expired', 'its time was over before an instance had room for it', RETAIN)
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif redis.call('EXISTS', P .. 'out:' .. r.frontend) == 0 then
    -- Nobody would read its answer. A front end that only slept puts it back; else it expires.
    lose(id, r, me, 'its front end is gone')
    result[#result + 1] = {id, 'STALE', '', ''}
  elseif full then
    result[#result + 1] = {id, 'WAIT', '', ''}
  else
    local decode, tokens, never = pick(tonumber(r.kv_tokens), tonumber(r.input_tokens))
    if decode then
      reserve(decode, tokens, 1)
      local inbox_entry = redis.call('XADD', P .. 'inbox:' .. decode, '*', 'id', id, 'epoch', epoch, 'prefill', me,
                                       'frontend', r.frontend)
      redis.call('HSET', P .. 'request:' .. id, 'state', 'prefill', 'prefill', me, 'decode', decode,
                 'inbox_entry', inbox_entry, 'kv_reserved', tokens, 'claimed_ms', now)
      redis.call('HINCRBY', P .. 'request:' .. id, 'attempts', 1)
      count('bound')
      forget_preference(id, r)
      owe(r.class, nil, -tonumber(r.input_tokens))
      took(tonumber(r.input_tokens), now)
      result[#result + 1] = {id, 'BOUND', decode, r.frontend}
    elseif never then
      terminate(id, r, 'failed', 'no decode instance has a KV pool that holds its ' .. r.input_tokens .. ' input tokens',
                RETAIN)
      result[#result + 1] = {id, 'STALE', '', ''}
    else
      full = true
      result[#result + 1] = {id, 'WAIT', '', ''}
    end
  end
end
spill_due(16)
feed_queue()
if unclaimed() == 0 then nobody_waits() end
return result
